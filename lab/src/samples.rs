//! Figures of repeated runs, and how pages show them.

/// The figures of several runs, at least one.
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn new(mut runs: Vec<f64>) -> Self {
        runs.sort_by(f64::total_cmp);
        Self(runs)
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The lower and the upper quartile.
    pub fn quartiles(&self) -> (f64, f64) {
        (self.quantile(0.25), self.quantile(0.75))
    }

    /// The figure below which this part of all figures is, between two neighbours in proportion.
    fn quantile(&self, part: f64) -> f64 {
        let place = part * self.0.len().saturating_sub(1) as f64;
        let at = |place: f64| self.0.get(place as usize).copied().unwrap_or(f64::NAN);
        let (low, high) = (at(place.floor()), at(place.ceil()));
        low + (high - low) * place.fract()
    }
}

/// A whole number in groups of three digits.
pub fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let first = digits.len() % 3;
    let mut groups: Vec<_> =
        (first..digits.len()).step_by(3).map(|at| &digits[at..at + 3]).collect();
    if first > 0 {
        groups.insert(0, &digits[..first]);
    }
    groups.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_between_neighbours_in_proportion() {
        let samples = Samples::new(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((samples.median(), samples.quartiles()), (2.5, (1.75, 3.25)));
        let samples = Samples::new(vec![10.0, 30.0, 20.0]);
        assert_eq!((samples.median(), samples.quartiles()), (20.0, (15.0, 25.0)));
        assert_eq!(Samples::new(vec![7.0]).quartiles(), (7.0, 7.0));
        assert!(Samples::new(Vec::new()).median().is_nan());
    }

    #[test]
    fn a_number_is_in_groups_of_three_digits() {
        let shown = [7.4, 999.6, 1000.0, 1_234_567.0].map(grouped);
        assert_eq!(shown, ["7", "1 000", "1 000", "1 234 567"]);
    }
}

//! The distribution of latencies, printed as bars.

use hdrhistogram::Histogram;
use serde_json::{Value, json};
use std::time::Duration;

/// The precision, in significant figures.
const FIGURES: u8 = 3;
/// The longest bar, in characters.
const WIDTH: f64 = 50.0;

#[derive(Debug)]
pub struct Latencies(Histogram<u64>);

impl Latencies {
    pub fn new() -> Self {
        // It grows with the values.
        Self(Histogram::new(FIGURES).expect("three figures are allowed"))
    }

    pub fn record(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        // It rejects values of 2^63 and more, which are three hundred years.
        let _ = self.0.record(nanos);
    }

    pub fn add(&mut self, other: &Self) {
        // It grows, so this cannot fail.
        let _ = self.0.add(&other.0);
    }

    /// In nanoseconds.
    pub fn as_json(&self) -> Value {
        let at = |quantile| self.0.value_at_quantile(quantile);
        json!({"mean": self.0.mean(), "p50": at(0.5), "p99": at(0.99), "p999": at(0.999),
            "max": self.0.max()})
    }

    /// Prints one line for each factor of the square root of two.
    pub fn print(&self) {
        let samples = self.0.len();
        say!("latency of {samples} requests, every {}th:", crate::bench::SAMPLE);
        let mut bars = Vec::new();
        let (mut from, mut to) = (0, 1000f64);
        while from <= self.0.max() {
            let end = to as u64;
            bars.push((end, self.0.count_between(from, end - 1)));
            (from, to) = (end, to * std::f64::consts::SQRT_2);
        }
        let first = bars.iter().position(|(_, count)| *count > 0).unwrap_or(0);
        let most = bars.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
        for (end, count) in &bars[first..] {
            let length = (*count as f64 / most as f64 * WIDTH).ceil() as usize;
            let share = 100.0 * *count as f64 / samples.max(1) as f64;
            say!("  < {:>9} {share:5.1} % {}", micros(*end), "█".repeat(length));
        }
        let at = |quantile| micros(self.0.value_at_quantile(quantile));
        say!(
            "  half within {}, 99 % within {}, 99.9 % within {}, the longest {}",
            at(0.5),
            at(0.99),
            at(0.999),
            micros(self.0.max())
        );
    }
}

fn micros(nanos: u64) -> String {
    let nanos = nanos as f64;
    if nanos < 1e6 {
        format!("{:.1} µs", nanos / 1e3)
    } else if nanos < 1e9 {
        format!("{:.1} ms", nanos / 1e6)
    } else {
        format!("{:.2} s", nanos / 1e9)
    }
}

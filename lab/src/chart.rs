//! Bar charts as SVG, for pages of the documentation: legible on a light and on a dark
//! background.

use std::fmt::Write as _;

/// Bars on one scale.
pub struct Panel {
    pub title: String,
    pub bars: Vec<Bar>,
}

pub struct Bar {
    pub label: String,
    pub value: f64,
    /// Shown behind the bar.
    pub text: String,
    /// Whether it is highlighted.
    pub strong: bool,
}

const WIDTH: usize = 760;
/// The left end of the bars, and the length of the longest.
const LEFT: usize = 220;
const LONGEST: f64 = 380.0;
const ROW: usize = 26;
const THICKNESS: usize = 18;
const TITLE: usize = 34;

/// The bars have colours that contrast with white and with black; only the text changes
/// with the background.
const STYLE: &str = "\
text { font: 13px sans-serif; fill: #24292f } \
.title { font-weight: bold } \
.plain { fill: #8c959f } \
.strong { fill: #2f81f7 } \
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }";

/// A chart of panels, one below the other.
pub fn svg(panels: &[Panel]) -> String {
    let height: usize = panels.iter().map(|panel| TITLE + ROW * panel.bars.len()).sum();
    let height = height + 10;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\">\n<style>{STYLE}</style>\n"
    );
    let mut top = 0;
    for panel in panels {
        let largest = panel.bars.iter().map(|bar| bar.value).fold(f64::MIN_POSITIVE, f64::max);
        let title = escaped(&panel.title);
        writeln!(svg, "<text class=\"title\" x=\"10\" y=\"{}\">{title}</text>", top + 22)
            .expect("writing to a string succeeds");
        top += TITLE;
        for bar in &panel.bars {
            svg += &row(bar, bar.value / largest * LONGEST, top);
            top += ROW;
        }
    }
    svg + "</svg>\n"
}

fn row(bar: &Bar, length: f64, top: usize) -> String {
    let (label, text) = (escaped(&bar.label), escaped(&bar.text));
    let class = if bar.strong { "strong" } else { "plain" };
    // Long enough to be visible.
    let length = length.max(1.0);
    let (end, base) = (LEFT - 8, top + 14);
    let behind = LEFT as f64 + length + 8.0;
    format!(
        "<text x=\"{end}\" y=\"{base}\" text-anchor=\"end\">{label}</text>\
         <rect class=\"{class}\" x=\"{LEFT}\" y=\"{top}\" width=\"{length:.1}\" \
         height=\"{THICKNESS}\" rx=\"2\"/>\
         <text x=\"{behind:.1}\" y=\"{base}\">{text}</text>\n"
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_bar_of_each_panel_has_the_full_length() {
        let bar =
            |value, strong| Bar { label: "a<b".to_owned(), value, text: "t".to_owned(), strong };
        let panel = |values: [f64; 2]| Panel {
            title: "IOPS".to_owned(),
            bars: values.map(|value| bar(value, value > 5.0)).into(),
        };
        let svg = svg(&[panel([1.0, 10.0]), panel([300.0, 600.0])]);
        assert_eq!(svg.matches("width=\"380.0\"").count(), 2);
        assert_eq!(svg.matches("width=\"38.0\"").count(), 1);
        assert_eq!(svg.matches("width=\"190.0\"").count(), 1);
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"));
    }
}

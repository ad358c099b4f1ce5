//! Formatting of numbers as text.

/// Format of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// A score with this many decimals.
    Score(usize),
    /// A relative change in percent.
    Percent,
    /// A difference of scores.
    Signed,
    /// A duration, given in seconds.
    Seconds,
    /// A size, given in bytes.
    Bytes,
}

/// Placeholder for values that were not measured.
pub(crate) const NONE: &str = "–";

impl Format {
    /// Formats a number, with a true minus sign.
    pub fn text(self, value: f64) -> String {
        let text = match self {
            Format::Score(decimals) => format!("{value:.decimals$}"),
            Format::Percent if value.abs() >= 0.9995 => format!("{:+.0}%", 100.0 * value),
            Format::Percent => format!("{:+.1}%", 100.0 * value),
            Format::Signed => format!("{value:+.4}"),
            Format::Seconds => duration(value),
            Format::Bytes => size(value),
        };
        let zero = text.chars().all(|c| matches!(c, '+' | '-' | '0' | '.' | '%'));
        let text = if zero { text.trim_start_matches(['+', '-']).to_owned() } else { text };
        text.replace('-', "−")
    }

    /// Formats a spread or an error in the same unit, without a sign.
    pub fn width(self, value: f64) -> String {
        match self {
            Format::Score(decimals) => format!("{value:.decimals$}"),
            Format::Percent => format!("{:.1}%", 100.0 * value),
            Format::Signed => format!("{value:.4}"),
            Format::Seconds | Format::Bytes => self.text(value),
        }
    }

    /// Formats a difference in the same unit.
    pub fn difference(self, value: f64) -> String {
        match self {
            Format::Score(decimals) => {
                let text = format!("{value:+.decimals$}");
                if text.contains(|c: char| ('1'..='9').contains(&c)) {
                    text.replace('-', "−")
                } else {
                    text[1..].to_owned()
                }
            }
            other => other.text(value),
        }
    }
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 3600.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn size(bytes: f64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let step = (0..units.len() - 1).find(|&i| bytes.abs() < 999.5 * 1000f64.powi(i as i32)).unwrap_or(units.len() - 1);
    let value = bytes / 1000f64.powi(step as i32);
    if step == 0 || value >= 99.95 {
        format!("{value:.0} {}", units[step])
    } else {
        format!("{value:.1} {}", units[step])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_as_the_paper_prints_them() {
        assert_eq!(Format::Score(4).text(0.62229), "0.6223");
        assert_eq!(Format::Percent.text(-0.0684), "−6.8%");
        assert_eq!(Format::Percent.text(9.85), "+985%");
        assert_eq!(Format::Percent.text(-0.0001), "0.0%", "no negative zero");
        assert_eq!(Format::Seconds.text(5400.0), "1.5 h");
        assert_eq!(Format::Bytes.text(16_060_000_000.0), "16.1 GB");
        assert_eq!(Format::Bytes.text(999_600.0), "1.0 MB");
    }
}

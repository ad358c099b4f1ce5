//! Human-readable numbers, sizes and durations.

/// Formats a number: `950`, `1.2 k`, `3.4 M`, `5.6 G`.
pub(super) fn count(number: u64) -> String {
    let (value, unit) = scaled(number as f64);
    if unit.is_empty() { number.to_string() } else { format!("{value:.1} {unit}") }
}

/// Formats a number of bytes.
pub(super) fn bytes(number: u64) -> String {
    let (value, unit) = scaled(number as f64);
    if unit.is_empty() { format!("{number} B") } else { format!("{value:.1} {unit}B") }
}

fn scaled(value: f64) -> (f64, &'static str) {
    let units = ["", "k", "M", "G", "T", "P"];
    let power = (0..units.len() - 1).find(|&power| value < 1000f64.powi(power as i32 + 1) * 0.9995);
    let power = power.unwrap_or(units.len() - 1);
    (value / 1000f64.powi(power as i32), units[power])
}

/// Formats a duration: `45 s`, `12 min`, `3.5 h`, `12 days`.
pub(super) fn time(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s if s < 48.0 * 3600.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.0} days", s / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_a_unit_that_fits() {
        assert_eq!([count(950), count(1_234), count(999_999), count(0)], ["950", "1.2 k", "1.0 M", "0"]);
        assert_eq!([bytes(12), bytes(16_060_522_496)], ["12 B", "16.1 GB"]);
        assert_eq!([time(45.0), time(600.0), time(7200.0), time(1e6)], ["45 s", "10 min", "2.0 h", "12 days"]);
    }
}

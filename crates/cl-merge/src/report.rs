//! Results as text and JSON, and parsing of byte counts.

use std::io::Write;

use anyhow::Result;

/// Writes a value as JSON, followed by a newline.
pub(crate) fn write_json(out: &mut dyn Write, value: &impl serde::Serialize) -> Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)?;
    Ok(())
}

/// Formats a number of bytes in a readable unit.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{bytes} bytes"),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// Parses a number of bytes with a unit: B, kB, MB, GB, or KiB, MiB, GiB.
///
/// # Errors
/// Returns a message that says what is wrong, with an example of valid input.
pub fn bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim() {
        "" | "B" => 1u64,
        "kB" | "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        other => return Err(format!("unknown unit `{other}`; use MB, GB, MiB or GiB")),
    };
    let number: f64 =
        number.parse().map_err(|_| format!("`{text}` is not a number of bytes; write for example 800MiB or 2GiB"))?;
    Ok((number * factor as f64) as u64)
}

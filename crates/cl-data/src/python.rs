//! Python's definitions of text functions that differ from Rust's.

/// Whether a character is white space for `str.split()` and `str.strip()`: Unicode white space, or a separator from
/// U+001C to U+001F.
///
/// ```
/// assert!(cl_data::python::is_space('\u{1c}') && cl_data::python::is_space('\u{3000}'));
/// assert!(!cl_data::python::is_space('\u{200b}'));
/// ```
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

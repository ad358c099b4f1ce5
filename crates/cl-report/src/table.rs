//! Tables of measured numbers, as Markdown, CSV and LaTeX.

use crate::format::{Format, NONE};
use crate::paper::Printed;
use crate::study::Value;

/// A table of the report.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReportTable {
    /// Name in links and file names, such as `table-1`.
    pub id: String,
    /// `Table 1`.
    pub label: String,
    pub title: String,
    /// Description: the comparison and how it was computed.
    pub caption: String,
    /// Headers, without that of the row names.
    pub columns: Vec<String>,
    pub rows: Vec<Row>,
    /// Its sources.
    pub source: String,
    /// The reason if the table is empty.
    pub missing: Option<String>,
}

#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub name: String,
    pub cells: Vec<Cell>,
    /// Whether it summarizes the rows above; it stays below them when the table is sorted.
    pub summary: bool,
}

/// A number with its spread and the paper's number.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cell {
    pub value: Option<Value>,
    pub format: Option<Format>,
    pub paper: Option<Printed>,
}

impl Cell {
    pub fn new(value: Option<Value>, format: Format) -> Cell {
        Cell { value, format: Some(format), paper: None }
    }

    pub fn beside(self, paper: Option<Printed>) -> Cell {
        Cell { paper, ..self }
    }

    fn format(&self) -> Format {
        self.format.unwrap_or(Format::Score(4))
    }

    /// Formats the mean.
    pub fn main(&self) -> String {
        self.value.as_ref().map_or(NONE.to_owned(), |v| self.format().text(v.mean))
    }

    /// Formats `± s` with the standard deviation over seeds, or `(e)` with the standard error over documents for one
    /// seed.
    pub fn uncertainty(&self) -> Option<String> {
        let value = self.value.as_ref()?;
        match (value.spread(), value.standard_error) {
            (Some(spread), _) => Some(format!("± {}", self.format().width(spread))),
            (None, Some(error)) => Some(format!("({})", self.format().width(error))),
            (None, None) => None,
        }
    }

    /// Formats the paper's number, with a mark if it is printed in another column.
    pub fn printed(&self) -> Option<String> {
        let paper = self.paper?;
        Some(self.format().text(paper.value) + if paper.swapped { "†" } else { "" })
    }

    /// Returns our number minus the paper's.
    pub fn delta(&self) -> Option<f64> {
        Some(self.value.as_ref()?.mean - self.paper?.value)
    }

    /// Formats the complete cell in one line.
    pub fn details(&self) -> String {
        let mut parts = Vec::new();
        if let Some(value) = &self.value {
            parts.push(self.main());
            if let Some(spread) = value.spread() {
                parts.push(format!("± {} over {} seeds", self.format().width(spread), value.by_seed.len()));
                let seeds = value.by_seed.iter().map(|(s, v)| format!("{s}: {}", self.format().text(*v)));
                parts.push(format!("by seed {}", seeds.collect::<Vec<_>>().join(", ")));
            }
            if let Some(error) = value.standard_error {
                parts.push(format!("standard error {}", self.format().width(error)));
            }
        }
        if let Some(printed) = self.printed() {
            parts.push(format!("paper {printed}"));
            parts.extend(self.delta().map(|d| format!("Δ {}", self.format().difference(d))));
        }
        parts.join("; ")
    }

    fn text(&self) -> String {
        self.uncertainty().map_or(self.main(), |u| format!("{} {u}", self.main()))
    }
}

impl ReportTable {
    /// Formats the table as Markdown; the paper's numbers and the differences are separate rows below ours.
    pub fn markdown(&self) -> String {
        let mut text = format!("### {}\n\n", markdown(&format!("{}. {}", self.label, self.title)));
        if let Some(missing) = &self.missing {
            return format!("{text}{}\n", markdown(missing));
        }
        let header = std::iter::once(String::new()).chain(self.columns.iter().map(|c| markdown(c)));
        let rows = self.lines().into_iter().map(|line| line.iter().map(|cell| markdown(cell)).collect());
        let caption = markdown(&format!("{} {}", self.caption, self.source));
        text += &cl_eval::Table { caption, columns: header.collect(), rows: rows.collect() }.markdown();
        text
    }

    /// Formats the table as a LaTeX float, using the package booktabs.
    pub fn latex(&self) -> String {
        if let Some(missing) = &self.missing {
            return format!("% {}: {}\n", one_line(&self.label), one_line(missing));
        }
        let line = |cells: Vec<String>| cells.iter().map(|c| latex(c)).collect::<Vec<_>>().join(" & ") + r" \\" + "\n";
        let header = line(std::iter::once(String::new()).chain(self.columns.iter().cloned()).collect());
        let mut body = String::new();
        for row in &self.rows {
            if row.summary && !body.ends_with("\\midrule\n") && !body.is_empty() {
                body += "\\midrule\n";
            }
            body.extend(lines_of(row).into_iter().map(line));
        }
        format!(
            "\\begin{{table}}[t]\n\\centering\\small\n\\caption{{{}}}\n\\label{{tab:{}}}\n\\begin{{tabular}}{{l{}}}\n\\toprule\n\
             {header}\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n",
            latex(&format!("{}. {}", self.title, self.caption)),
            self.id,
            "r".repeat(self.columns.len()),
        )
    }

    /// Returns one line per cell: table, row, column, value, spread, seeds, standard error, the paper's number,
    /// difference.
    pub fn tidy(&self) -> Vec<Vec<String>> {
        let number = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
        let cell = |row: &Row, column: &String, cell: &Cell| {
            let value = cell.value.as_ref();
            vec![
                self.label.clone(),
                row.name.clone(),
                column.clone(),
                number(value.map(|v| v.mean)),
                number(value.and_then(Value::spread)),
                value.map_or(String::new(), |v| v.by_seed.len().to_string()),
                number(value.and_then(|v| v.standard_error)),
                number(cell.paper.map(|p| p.value)),
                number(cell.delta()),
            ]
        };
        self.rows.iter().flat_map(|r| self.columns.iter().zip(&r.cells).map(move |(c, one)| cell(r, c, one))).collect()
    }

    fn lines(&self) -> Vec<Vec<String>> {
        self.rows.iter().flat_map(lines_of).collect()
    }
}

/// Formats all tables as one Markdown file.
pub(crate) fn markdown_file(name: &str, tables: &[ReportTable]) -> String {
    let mut text = format!("# {}\n\n{}\n", markdown(name), markdown(READING));
    text.extend(tables.iter().map(|t| format!("\n{}", t.markdown())));
    text
}

/// Formats all tables as one CSV file, with one line per cell.
pub(crate) fn csv_file(tables: &[ReportTable]) -> String {
    let columns =
        ["table", "row", "column", "value", "spread", "seeds", "standard_error", "paper", "delta"].map(str::to_owned);
    let rows = tables.iter().flat_map(ReportTable::tidy).collect();
    cl_eval::Table { caption: String::new(), columns: columns.to_vec(), rows }.csv()
}

/// Formats all tables as one LaTeX file, to be included in a document.
pub(crate) fn latex_file(name: &str, tables: &[ReportTable]) -> String {
    let mut text = format!("% {}: tables. Needs \\usepackage{{booktabs}}.\n", one_line(name));
    text.extend(tables.iter().map(|t| format!("\n{}", t.latex())));
    text
}

/// Explanation of the notation in cells.
pub(crate) const READING: &str = "± is the sample standard deviation over seeds; a number in parentheses is the standard error over documents, \
     given where there is one seed. Δ is ours minus the paper's. † marks a number that the paper prints in another column.";

/// Formats a row, followed by the paper's row if there is one.
fn lines_of(row: &Row) -> Vec<Vec<String>> {
    let line = |name: &str, cell: &dyn Fn(&Cell) -> String| {
        std::iter::once(name.to_owned()).chain(row.cells.iter().map(cell)).collect::<Vec<String>>()
    };
    let mut lines = vec![line(&row.name, &Cell::text)];
    if row.cells.iter().any(|c| c.paper.is_some()) {
        let delta = |c: &Cell| c.delta().map_or(NONE.to_owned(), |d| c.format().difference(d));
        lines.push(line("  paper", &|c| c.printed().unwrap_or(NONE.to_owned())));
        lines.push(line("  Δ", &delta));
    }
    lines
}

/// Escapes text for Markdown.
fn markdown(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in one_line(text).chars() {
        match c {
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '&' => safe += "&amp;",
            '*' | '_' | '`' | '[' | ']' | '\\' => safe.extend(['\\', c]),
            _ => safe.push(c),
        }
    }
    safe
}

/// Escapes text for LaTeX.
fn latex(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in one_line(text).chars() {
        match c {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => safe.extend(['\\', c]),
            '\\' => safe += r"\textbackslash{}",
            '~' => safe += r"\textasciitilde{}",
            '^' => safe += r"\textasciicircum{}",
            '<' => safe += r"\textless{}",
            '>' => safe += r"\textgreater{}",
            '−' => safe += "$-$",
            '±' => safe += r"$\pm$",
            'Δ' => safe += r"$\Delta$",
            'λ' => safe += r"$\lambda$",
            '†' => safe += r"$^\dagger$",
            '–' => safe += "--",
            _ => safe.push(c),
        }
    }
    // An indented name belongs to a row below another one.
    safe.strip_prefix("  ").map_or(safe.clone(), |rest| format!(r"\quad {rest}"))
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> ReportTable {
        let value = Value { mean: 0.5, by_seed: vec![(1, 0.4), (2, 0.6)], standard_error: Some(0.01) };
        let cell = Cell::new(Some(value), Format::Score(4)).beside(Some(Printed { value: 0.55, swapped: true }));
        let row = Row { name: "<b>_100%|\\".to_owned(), cells: vec![cell, Cell::default()], summary: false };
        let (id, label) = ("table-1".to_owned(), "Table 1".to_owned());
        let columns = vec!["a&b".to_owned(), "c".to_owned()];
        ReportTable { id, label, columns, rows: vec![row], ..ReportTable::default() }
    }

    #[test]
    fn markdown_shows_names_as_they_are() {
        let text = table().markdown();
        assert!(text.contains("|  | a&amp;b | c |"), "{text}");
        assert!(text.contains(r"| &lt;b&gt;\_100%\|\\ | 0.5000 ± 0.1414 | – |"), "{text}");
        assert!(text.contains("|   paper | 0.5500† | – |\n|   Δ | −0.0500 | – |"), "{text}");
    }

    #[test]
    fn latex_shows_names_as_they_are() {
        let text = table().latex();
        assert!(
            text.contains(r"\textless{}b\textgreater{}\_100\%|\textbackslash{} & 0.5000 $\pm$ 0.1414 & --"),
            "{text}"
        );
        assert!(text.contains(r"\quad paper & 0.5500$^\dagger$ & --"), "{text}");
    }

    #[test]
    fn csv_has_a_line_for_each_cell() {
        let text = csv_file(&[table()]);
        assert!(text.contains("Table 1,<b>_100%|\\,a&b,0.5,0.14142135623730"), "{text}");
        assert!(text.contains(",2,0.01,0.55,-0.05"), "{text}");
    }
}

use super::score_matrix::{Group, ScoreMatrix};

/// A table of strings with a caption, which can be written as Markdown, aligned text or CSV.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The caption.
    pub caption: String,
    /// Column headers; the first is that of the row names.
    pub columns: Vec<String>,
    /// Rows; the first cell is the row's name.
    pub rows: Vec<Vec<String>>,
}

const NONE: &str = "–";

/// Lays out the matrix like the paper's tables: the columns of one group and their average (first for old knowledge, as
/// in Tables 1 and 2, and last for new, as in Tables 3 and 4); rows for the base model and each round, then the gain
/// over base and, for new knowledge, the relative BWT. Returns `None` if there is no such column or no row.
///
/// The average of the gains is the mean of the percentages for old knowledge and the ratio of the means for new, as in
/// the paper; the other average is in the caption, which should also name the profile of the scores. The average BWT is
/// the mean over the tasks for which it is defined.
pub fn table_of(matrix: &ScoreMatrix, group: Group, caption: &str) -> Option<Table> {
    let chosen: Vec<usize> = (0..matrix.columns.len()).filter(|&c| matrix.columns[c].group == group).collect();
    if chosen.is_empty() || matrix.rows.is_empty() {
        return None;
    }
    let row = |name: &str, cells: Vec<String>, average: String| {
        let mut row = vec![name.to_owned()];
        row.extend(cells);
        row.insert(if group == Group::Old { 1 } else { row.len() }, average);
        row
    };
    let cells = |cell: &dyn Fn(usize) -> String| chosen.iter().map(|&c| cell(c)).collect::<Vec<String>>();
    let columns = row("", cells(&|c| matrix.columns[c].name.clone()), "AVE".to_owned());
    let mut rows = Vec::new();
    for (t, name) in matrix.rows.iter().enumerate() {
        rows.push(row(name, cells(&|c| score(matrix.at(t, c))), score(matrix.mean(t, group))));
    }
    let mut caption = caption.to_owned();
    if matrix.rows.len() > 1 {
        let (percentages, ratio) = matrix.average_gains(group);
        let (average, other) = match group {
            Group::Old => (percentages, format!("ratio of the means {}", percent(ratio))),
            Group::New => (ratio, format!("mean of the percentages {}", percent(percentages))),
        };
        rows.push(row("gain base", cells(&|c| percent(matrix.gain(c))), percent(average)));
        caption = format!("{caption} Gain over base: {} ({other}).", percent(average));
    }
    if group == Group::New && matrix.rows.len() > 2 {
        let average = matrix.mean_of(|m, c| if m.columns[c].group == group { m.relative_bwt(c) } else { None });
        rows.push(row("BWT", cells(&|c| percent(matrix.relative_bwt(c))), percent(average)));
    }
    Some(Table { caption: caption.trim().to_owned(), columns, rows })
}

/// Returns a table with one row per sequence: its final averages, BWT, forgetting and forward transfer.
pub fn summary_table(matrices: &[(String, &ScoreMatrix)], caption: &str) -> Table {
    let columns = ["", "old AVE", "new AVE", "BWT (relative)", "BWT (absolute)", "forgetting", "forward transfer"];
    let rows = matrices
        .iter()
        .map(|(name, m)| {
            let last = m.rows.len().saturating_sub(1);
            vec![
                name.clone(),
                score(m.mean(last, Group::Old)),
                score(m.mean(last, Group::New)),
                percent(m.mean_of(ScoreMatrix::relative_bwt)),
                signed(m.mean_of(ScoreMatrix::absolute_bwt)),
                signed(m.mean_of(ScoreMatrix::forgetting)),
                signed(m.mean_of(ScoreMatrix::forward_transfer)),
            ]
        })
        .collect();
    Table { caption: caption.to_owned(), columns: columns.map(str::to_owned).to_vec(), rows }
}

impl Table {
    /// Formats the table as Markdown, with the caption below.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|c| one_line(c).replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let rule = std::iter::once("---").chain(self.columns.iter().skip(1).map(|_| "---:"));
        let mut text = line(&self.columns);
        text += &format!("| {} |\n", rule.collect::<Vec<_>>().join(" | "));
        text.extend(self.rows.iter().map(|r| line(r)));
        format!("{text}\n{}\n", self.caption)
    }

    /// Formats the table as aligned text, for a terminal.
    pub fn text(&self) -> String {
        let lines: Vec<Vec<String>> = std::iter::once(&self.columns)
            .chain(&self.rows)
            .map(|row| row.iter().map(|cell| one_line(cell)).collect())
            .collect();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|i| lines.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for row in &lines {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .enumerate()
                .map(|(i, (cell, &w))| if i == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") })
                .collect();
            text += cells.join("  ").trim_end();
            text.push('\n');
        }
        format!("{text}{}\n", self.caption)
    }

    /// Formats the table as CSV (RFC 4180), without the caption.
    pub fn csv(&self) -> String {
        let field = |cell: &String| {
            if cell.contains([',', '"', '\n', '\r']) {
                format!("\"{}\"", cell.replace('"', "\"\""))
            } else {
                cell.clone()
            }
        };
        let mut text = String::new();
        for row in std::iter::once(&self.columns).chain(&self.rows) {
            text += &row.iter().map(field).collect::<Vec<_>>().join(",");
            text.push('\n');
        }
        text
    }
}

fn one_line(cell: &str) -> String {
    cell.replace(['\n', '\r', '\t'], " ")
}

fn score(value: Option<f64>) -> String {
    value.map_or(NONE.to_owned(), |v| format!("{v:.4}"))
}

fn signed(value: Option<f64>) -> String {
    value.map_or(NONE.to_owned(), |v| unsigned_zero(format!("{v:+.4}")))
}

fn percent(value: Option<f64>) -> String {
    value.map_or(NONE.to_owned(), |v| unsigned_zero(format!("{:+.1}%", 100.0 * v)))
}

/// Removes the sign of a zero, since "-0.0%" looks like a loss.
fn unsigned_zero(number: String) -> String {
    let zero = number.chars().all(|c| matches!(c, '+' | '-' | '0' | '.' | '%'));
    if zero { number.trim_start_matches(['+', '-']).to_owned() } else { number }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::Column;

    #[test]
    fn laid_out_like_the_paper() {
        let mut m =
            ScoreMatrix::new(vec![Column::new("a", Group::New, Some(1)), Column::new("b", Group::New, Some(2))]);
        m.push("base", vec![Some(0.2), Some(0.0)]).unwrap();
        m.push("LoRA 1", vec![Some(0.8), Some(0.1)]).unwrap();
        m.push("LoRA 1,2", vec![Some(0.6), Some(0.9)]).unwrap();
        let table = table_of(&m, Group::New, "New knowledge (profile method).").unwrap();
        let text = table.text();
        let expected = [
            "                a       b      AVE",
            "base       0.2000  0.0000   0.1000",
            "LoRA 1     0.8000  0.1000   0.4500",
            "LoRA 1,2   0.6000  0.9000   0.7500",
            "gain base +200.0%       –  +650.0%",
            "BWT        -25.0%       –   -25.0%",
        ];
        for (line, expected) in text.lines().zip(expected) {
            assert_eq!(line.split_whitespace().collect::<Vec<_>>(), expected.split_whitespace().collect::<Vec<_>>());
        }
        assert!(table.markdown().starts_with("|  | a | b | AVE |\n| --- | ---: | ---: | ---: |\n"));
        assert!(table.csv().contains("\"LoRA 1,2\",0.6000"));
        assert_eq!(table_of(&m, Group::Old, ""), None);
        assert_eq!(
            table.caption,
            "New knowledge (profile method). Gain over base: +650.0% (mean of the percentages –)."
        );
    }

    #[test]
    fn old_knowledge_has_its_average_in_front_and_no_bwt() {
        let mut m = ScoreMatrix::new(vec![
            Column::new("mmlu", Group::Old, None),
            Column::new("new", Group::New, Some(1)),
            Column::new("piqa", Group::Old, None),
        ]);
        m.push("base", vec![Some(0.5), Some(0.1), Some(0.8)]).unwrap();
        m.push("FFT 1", vec![Some(0.4), Some(0.7), None]).unwrap();
        m.push("FFT 1,2", vec![Some(0.45), Some(0.6), Some(0.4)]).unwrap();
        let table = table_of(&m, Group::Old, "Old.").unwrap();
        let expected = "\
,AVE,mmlu,piqa
base,0.6500,0.5000,0.8000
FFT 1,–,0.4000,–
\"FFT 1,2\",0.4250,0.4500,0.4000
gain base,-30.0%,-10.0%,-50.0%
";
        assert_eq!(table.csv(), expected);
        assert_eq!(table.caption, "Old. Gain over base: -30.0% (ratio of the means -34.6%).");
    }

    #[test]
    fn cells_cannot_break_a_table() {
        let columns = vec!["".to_owned(), "a|b\nc".to_owned()];
        let table = Table { caption: "c".to_owned(), columns, rows: vec![vec!["\"x\"".to_owned(), "1,5".to_owned()]] };
        assert_eq!(table.markdown(), "|  | a\\|b c |\n| --- | ---: |\n| \"x\" | 1,5 |\n\nc\n");
        assert_eq!(table.csv(), ",\"a|b\nc\"\n\"\"\"x\"\"\",\"1,5\"\n");
        assert_eq!(table.text(), "     a|b c\n\"x\"    1,5\nc\n");
    }
}

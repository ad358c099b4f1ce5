use crate::{Group, ScoreMatrix, mean_of_percentages, ratio_of_means};

/// Cells of text with a caption, to be written as Markdown, aligned text or CSV.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// What the table shows.
    pub caption: String,
    /// Heads, that of the rows' names first.
    pub columns: Vec<String>,
    /// Rows, their names first.
    pub rows: Vec<Vec<String>>,
}

const NONE: &str = "–";

/// The matrix laid out like the paper's tables: one group's columns and their average; rows for the base and each round,
/// then gain over base, and for new knowledge the relative BWT.
///
/// The average of the gains is the mean of the percentages for old knowledge and the ratio of the means for new, as in the
/// paper; the other kind is in the caption.
pub fn table_of(matrix: &ScoreMatrix, group: Group, caption: &str) -> Option<Table> {
    let chosen: Vec<usize> = (0..matrix.columns.len()).filter(|&c| matrix.columns[c].group == group).collect();
    if chosen.is_empty() || matrix.rows.is_empty() {
        return None;
    }
    let mut columns = vec![String::new()];
    columns.extend(chosen.iter().map(|&c| matrix.columns[c].name.clone()));
    columns.push("AVE".to_owned());
    let mut rows = Vec::new();
    for (t, name) in matrix.rows.iter().enumerate() {
        let mut row = vec![name.clone()];
        row.extend(chosen.iter().map(|&c| score(matrix.at(t, c))));
        row.push(score(matrix.mean(t, group)));
        rows.push(row);
    }
    let mut caption = caption.to_owned();
    if matrix.rows.len() > 1 {
        let values = |row: usize| chosen.iter().map(|&c| matrix.at(row, c)).collect::<Option<Vec<f64>>>();
        let means = values(0).zip(values(matrix.rows.len() - 1)).map(|(before, after)| {
            (mean_of_percentages(&before, &after), ratio_of_means(&before, &after))
        });
        let (percentages, ratio) = means.unwrap_or((None, None));
        let (average, other) = match group {
            Group::Old => (percentages, format!("ratio of the means {}", percent(ratio))),
            Group::New => (ratio, format!("mean of the percentages {}", percent(percentages))),
        };
        let mut gain = vec!["gain base".to_owned()];
        gain.extend(chosen.iter().map(|&c| percent(matrix.gain(c))));
        gain.push(percent(average));
        rows.push(gain);
        caption = format!("{caption} Gain over base: {} ({other}).", percent(average));
        if group == Group::New && matrix.rows.len() > 2 {
            let mut bwt = vec!["BWT".to_owned()];
            bwt.extend(chosen.iter().map(|&c| percent(matrix.relative_bwt(c))));
            bwt.push(percent(matrix.mean_of(ScoreMatrix::relative_bwt)));
            rows.push(bwt);
        }
    }
    Some(Table { caption, columns, rows })
}

/// One row a sequence: how it ended, in every definition the literature has.
pub fn summary_table(matrices: &[(String, &ScoreMatrix)], caption: &str) -> Table {
    let columns =
        ["", "old AVE", "new AVE", "BWT (relative)", "BWT (absolute)", "forgetting", "forward transfer"];
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
    /// Markdown, the caption under the table.
    pub fn markdown(&self) -> String {
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|c| c.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let rule = std::iter::once("---").chain(self.columns.iter().skip(1).map(|_| "---:"));
        let mut text = line(&self.columns);
        text += &format!("| {} |\n", rule.collect::<Vec<_>>().join(" | "));
        text.extend(self.rows.iter().map(|r| line(r)));
        format!("{text}\n{}\n", self.caption)
    }

    /// Text in columns, for a terminal.
    pub fn text(&self) -> String {
        let all = || std::iter::once(&self.columns).chain(&self.rows);
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|i| all().filter_map(|r| r.get(i)).map(|c| c.chars().count()).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for row in all() {
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

    /// Comma-separated values, fields quoted where they need it.
    pub fn csv(&self) -> String {
        let field = |cell: &String| {
            if cell.contains([',', '"', '\n']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell.clone() }
        };
        let mut text = String::new();
        for row in std::iter::once(&self.columns).chain(&self.rows) {
            text += &row.iter().map(field).collect::<Vec<_>>().join(",");
            text.push('\n');
        }
        text
    }
}

fn score(value: Option<f64>) -> String {
    value.map_or(NONE.to_owned(), |v| format!("{v:.4}"))
}

fn signed(value: Option<f64>) -> String {
    value.map_or(NONE.to_owned(), |v| format!("{v:+.4}"))
}

fn percent(value: Option<f64>) -> String {
    value.map_or(NONE.to_owned(), |v| format!("{:+.1}%", 100.0 * v))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Column;

    #[test]
    fn laid_out_like_the_paper() {
        let mut m = ScoreMatrix::new(vec![
            Column::new("a", Group::New, Some(1)),
            Column::new("b", Group::New, Some(2)),
        ]);
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
    }
}

//! The paper's printed numbers, for comparison, and notes on their inconsistencies.

use cl_eval::paper::{PaperTable, Verdict, check, tables};

use crate::study::Span;

/// The paper's model.
pub(crate) const MODEL: &str = "Meta-Llama-3-8B";

/// A printed number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Printed {
    pub value: f64,
    /// Whether it is printed in the adjacent column, as in three rows of Table 6.
    pub swapped: bool,
}

/// The paper's tables, looked up by row and column.
pub(crate) struct Paper {
    tables: Vec<PaperTable>,
    swapped: Vec<(String, String)>,
}

impl Paper {
    pub fn new() -> Paper {
        let swapped = check().into_iter().filter(|c| c.verdict == Verdict::Swapped);
        Paper { tables: tables(), swapped: swapped.map(|c| (c.row, c.column)).collect() }
    }

    /// Looks up a cell by the label of a row of any table and the name of a column, or `AVold`, `AVnew`, `AVall`.
    ///
    /// Rows that are printed in two tables are taken from the one with four decimals. Averages that Table 6 swaps are
    /// returned for their correct column.
    pub fn cell(&self, label: &str, column: &str) -> Option<Printed> {
        let wanted = normal(label);
        self.tables.iter().find_map(|table| {
            let (row, place) = self.find(table, &wanted, column)?;
            let swapped = self.swapped.iter().any(|(r, c)| table.table == 6 && *r == row.row && c == column);
            let place = if swapped { 17 - place } else { place };
            Some(Printed { value: *row.values.get(place)?, swapped })
        })
    }

    fn find<'t>(
        &self,
        table: &'t PaperTable,
        wanted: &str,
        column: &str,
    ) -> Option<(&'t cl_eval::paper::PaperRow, usize)> {
        let old = matches!(table.table, 1 | 2 | 5);
        let name = match column {
            "AVold" if old => "AVE",
            "AVnew" if matches!(table.table, 3 | 4) => "AVE",
            "AVE" => return None,
            other => other,
        };
        let place = table.columns.iter().position(|c| c == name)?;
        let row = table.rows.iter().find(|r| normal(&r.row) == wanted)?;
        Some((row, place))
    }

    /// Looks up a cell in the rows below a table: `gain base`, `BWT`.
    pub fn under(&self, table: usize, row: &str, column: &str) -> Option<f64> {
        let table = self.tables.get(table.checked_sub(1)?)?;
        let place = table.columns.iter().position(|c| c == column)?;
        table.rows.iter().find(|r| r.row == row)?.values.get(place).copied()
    }

    /// Returns the paper's columns of a span.
    pub fn columns(&self, span: Span) -> Vec<&str> {
        let of = |table: usize| self.tables[table - 1].columns.iter().map(String::as_str).filter(|c| *c != "AVE");
        match span {
            Span::Old => of(1).collect(),
            Span::New => of(3).collect(),
            Span::All => of(1).chain(of(3)).collect(),
        }
    }
}

/// Normalizes labels of the same row: the paper writes `LoRA 1,2` once as `loRA 1,2`, and abbreviates labels in Table 6
/// that are spelled out in Table 5. The last rounds of Tables 1 to 4 are `LoRA` and `FFT` in Tables 5 and 6.
fn normal(label: &str) -> String {
    let label = label.trim().to_lowercase();
    match label.as_str() {
        "jnt-lor" => "joint-lora".to_owned(),
        "jnt-fft" => "joint-fft".to_owned(),
        "lor-rep" => "lora-rep".to_owned(),
        "lora" => "lora 1-7".to_owned(),
        "fft" => "fft 1-7".to_owned(),
        _ => label.replace("1-2", "1,2"),
    }
}

/// Notes on the paper's tables and figures.
pub(crate) const NOTES: [(&str, &str); 6] = [
    (
        "Table 6 exchanges AVnew and AVall in three rows",
        "In the rows LoRA, FFT and FFT-Rep the average over new tasks stands in the column of the average over all tasks, and the \
         other way round. Recomputed from the cells, AVnew and AVall are 0.542 and 0.595 (LoRA), 0.563 and 0.589 (FFT), 0.633 and \
         0.621 (FFT-Rep). This report compares with the average that belongs to the column and marks it with †.",
    ),
    (
        "Two kinds of average gain",
        "The average gain under Tables 1 and 2 (−7 % and −1 %) is the mean of the columns' percentages, that under Tables 3 and 4 \
         (60 % and 54 %) is the gain of the columns' mean. The other kind would be −6.3 % for Table 1, and 175 % and 192 % for \
         Tables 3 and 4, where one column that starts near zero outweighs all others. This report follows the paper in each table \
         and prints both kinds in the overview.",
    ),
    (
        "BWT is relative",
        "The paper's BWT is the final score over the score right after the task's own round, minus one. The literature's is the \
         difference of the two (Lopez-Paz and Ranzato, arXiv:1706.08840). The overview has both.",
    ),
    (
        "Figure 1 has six of the seven tasks",
        "Its caption speaks of six data sets: one-round training on the seventh, mathematics, is not shown, while Figure 4's one-round bars \
         cover all. This report shows every round that was trained.",
    ),
    (
        "The mixture of fully tuned models has four of the seven experts",
        "For memory, the paper's FFT mixture holds meeting, py150, science and math alone; its averages over new tasks are not \
         fully comparable with those of the other methods, as the paper says.",
    ),
    (
        "TIES and DARE ran on the factors, and DARE without its rescale",
        "The paper's merges went through PEFT, which trims and elects signs for each LoRA factor instead of the task vector, and \
         which before 0.19 dropped DARE's division by the density. Its low TIES and DARE bars may come from there.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn value(label: &str, column: &str) -> Option<f64> {
        Paper::new().cell(label, column).map(|p| p.value)
    }

    #[test]
    fn cells_by_label_and_column() {
        assert_eq!(value("LoRA 1,2", "mmlu"), Some(0.6315), "`loRA 1,2` in the paper");
        assert_eq!(value("LoRA 1-3", "meet"), Some(0.3771));
        assert_eq!(value("Joint-LoRA", "AVold"), Some(0.6524));
        assert_eq!(value("Joint-LoRA", "AVnew"), Some(0.585), "`Jnt-LoR` in Table 6");
        assert_eq!(value("base", "cstan"), Some(0.218));
        assert_eq!(value("LoRA", "cstan"), Some(0.508), "four decimals of Table 4");
        assert_eq!((value("nothing", "mmlu"), value("LoRA", "nothing"), value("LoRA", "AVE")), (None, None, None));
    }

    #[test]
    fn exchanged_averages_are_those_of_their_column() {
        assert_eq!(Paper::new().cell("FFT-Rep", "AVnew"), Some(Printed { value: 0.633, swapped: true }));
        assert_eq!(Paper::new().cell("LoRA", "AVall"), Some(Printed { value: 0.595, swapped: true }));
        assert_eq!(value("LoRA", "AVnew"), Some(0.543), "Table 4's own average is right");
    }

    #[test]
    fn rows_under_a_table() {
        let paper = Paper::new();
        assert_eq!(paper.under(4, "BWT", "sci"), Some(-0.41));
        assert_eq!(paper.under(4, "BWT", "gsm8k"), None, "the last task has none");
        assert_eq!(paper.under(1, "gain base", "AVE"), Some(-0.07));
        assert_eq!((paper.columns(Span::Old).len(), paper.columns(Span::New).len()), (7, 8));
    }
}

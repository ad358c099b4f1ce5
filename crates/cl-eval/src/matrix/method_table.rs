use super::score_matrix::{Column, Group, mean, mean_of_percentages, ratio_of_means};
use super::table::Table;

/// A score with its standard error, if known.
pub type Cell = Option<(f64, Option<f64>)>;

/// Scores of different methods on the same tasks, with one row per method: the last round of a sequence, a merge, a
/// mixture, or joint training.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MethodTable {
    /// The tasks.
    pub columns: Vec<Column>,
    /// Scores of the base model, for gains.
    pub base: Option<Vec<Cell>>,
    /// Names and scores of the methods, with one cell per column.
    pub rows: Vec<(String, Vec<Cell>)>,
}

impl MethodTable {
    /// Formats the table: old knowledge, then new; averages (`AVold`, `AVnew`, `AVall`); and gains over the base for
    /// old and new knowledge. Gains are averaged in two ways, as the mean of the columns' gains and as the gain of
    /// their mean, as in the paper's Tables 1 to 4.
    ///
    /// An average is missing if one of its columns was not measured.
    ///
    /// ```
    /// use cl_eval::{Column, Group, MethodTable};
    ///
    /// let columns = vec![Column::new("piqa", Group::Old, None), Column::new("FOMC", Group::New, Some(1))];
    /// let base = Some(vec![Some((0.8, None)), Some((0.2, None))]);
    /// let rows = vec![("LoRA".to_owned(), vec![Some((0.6, Some(0.01))), Some((0.5, None))])];
    /// let table = MethodTable { columns, base, rows }.table("After the last round.");
    /// assert_eq!(table.columns[..5], ["", "piqa", "FOMC", "AVold", "AVnew"]);
    /// assert_eq!(table.rows[1][..4], ["LoRA", "0.6000 ± 0.0100", "0.5000", "0.6000"]);
    /// assert_eq!(table.rows[1][6..8], ["-25.0%", "-25.0%"]);
    /// ```
    pub fn table(&self, caption: &str) -> Table {
        let order: Vec<usize> = [Group::Old, Group::New].into_iter().flat_map(|group| self.places(group)).collect();
        let mut columns = vec![String::new()];
        columns.extend(order.iter().map(|&c| self.columns[c].name.clone()));
        columns
            .extend(["AVold", "AVnew", "AVall", "gain old", "(of means)", "gain new", "(of means)"].map(str::to_owned));
        let base = self.base.as_ref().map(|cells| ("base", cells));
        let named = self.rows.iter().map(|(name, cells)| (name.as_str(), cells));
        let rows = base.into_iter().chain(named).map(|(name, cells)| self.row(name, cells, &order)).collect();
        Table { caption: caption.to_owned(), columns, rows }
    }

    fn row(&self, name: &str, cells: &[Cell], order: &[usize]) -> Vec<String> {
        let text = |cell: &Cell| match cell {
            Some((value, Some(error))) => format!("{value:.4} ± {error:.4}"),
            Some((value, None)) => format!("{value:.4}"),
            None => NONE.to_owned(),
        };
        let mut row = vec![name.to_owned()];
        row.extend(order.iter().map(|&c| text(&cells[c])));
        let average = |groups: &[Group]| {
            let places = groups.iter().flat_map(|&group| self.places(group));
            let values: Option<Vec<f64>> = places.map(|c| value(&cells[c])).collect();
            values.and_then(|values| mean(&values)).map_or(NONE.to_owned(), |v| format!("{v:.4}"))
        };
        row.extend([average(&[Group::Old]), average(&[Group::New]), average(&[Group::Old, Group::New])]);
        for group in [Group::Old, Group::New] {
            let gains = self.gains(cells, group);
            row.extend([gains.0, gains.1].map(|gain| gain.map_or(NONE.to_owned(), |g| format!("{:.1}%", 100.0 * g))));
        }
        row
    }

    /// Returns the gain over the base for the columns of a group: the mean of the gains, and the gain of the mean.
    fn gains(&self, cells: &[Cell], group: Group) -> (Option<f64>, Option<f64>) {
        let Some(base) = &self.base else { return (None, None) };
        let of = |cells: &[Cell]| self.places(group).map(|c| value(&cells[c])).collect::<Option<Vec<f64>>>();
        match (of(base), of(cells)) {
            (Some(before), Some(after)) => (mean_of_percentages(&before, &after), ratio_of_means(&before, &after)),
            _ => (None, None),
        }
    }

    fn places(&self, group: Group) -> impl Iterator<Item = usize> {
        self.columns.iter().enumerate().filter(move |(_, c)| c.group == group).map(|(place, _)| place)
    }
}

const NONE: &str = "–";

fn value(cell: &Cell) -> Option<f64> {
    cell.map(|(value, _)| value).filter(|v| v.is_finite())
}

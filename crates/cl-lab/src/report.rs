use cl_adapters::Overlap;
use cl_data::Profile;
use cl_eval::{Group, ScoreMatrix, Table, summary_table, table_of};

use crate::SequenceConfig;

/// What the rows of a sequence's tables are called after; of o-lora with its definition.
pub fn method_name(config: &SequenceConfig) -> &'static str {
    let overlap = config.train.olora.as_ref().map(|o| o.mode);
    match (config.train.lora.is_some(), overlap, config.replay.is_some()) {
        (true, None, false) => "LoRA",
        (true, None, true) => "LoRA-Rep",
        (true, Some(Overlap::L1), false) => "o-LoRA-l1",
        (true, Some(Overlap::L1), true) => "o-LoRA-l1-Rep",
        (true, Some(Overlap::Squared), false) => "o-LoRA-squared",
        (true, Some(Overlap::Squared), true) => "o-LoRA-squared-Rep",
        (true, Some(Overlap::Cosine), false) => "o-LoRA-cosine",
        (true, Some(Overlap::Cosine), true) => "o-LoRA-cosine-Rep",
        (false, _, false) => "FFT",
        (false, _, true) => "FFT-Rep",
    }
}

/// `LoRA 1`, `LoRA 1,2`, `LoRA 1-3`: the paper's names of rows.
pub(crate) fn row_name(method: &str, round: usize) -> String {
    match round {
        1 => format!("{method} 1"),
        2 => format!("{method} 1,2"),
        n => format!("{method} 1-{n}"),
    }
}

/// A sequence's tables: old knowledge as in the paper's Tables 1 and 2, new knowledge as in 3 and 4, then every definition of
/// transfer and forgetting.
pub fn tables_of(matrix: &ScoreMatrix, method: &str, profile: Profile) -> Vec<Table> {
    let caption = |what: &str| format!("{method}: {what} after each round (profile {profile}).");
    let mut tables: Vec<Table> = [(Group::Old, "old knowledge kept"), (Group::New, "new knowledge acquired and kept")]
        .into_iter()
        .filter_map(|(group, what)| table_of(matrix, group, &caption(what)))
        .collect();
    if matrix.rows.len() > 1 {
        let caption = format!("{method}: after the last round (profile {profile}).");
        tables.push(summary_table(&[(method.to_owned(), matrix)], &caption));
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_named_as_in_the_paper() {
        let names: Vec<String> = (1..=3).map(|r| row_name("LoRA", r)).collect();
        assert_eq!(names, ["LoRA 1", "LoRA 1,2", "LoRA 1-3"]);
    }
}

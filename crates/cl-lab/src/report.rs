use cl_adapters::Overlap;
use cl_data::Profile;
use cl_eval::{Group, ScoreMatrix, Table, summary_table, table_of};

use crate::SequenceConfig;

/// Name of a sequence's method in tables: `LoRA`, `FFT`, or `o-LoRA-l1(0.5)` with the penalty's definition and λ,
/// followed by `-Rep` with replay.
pub fn method_name(config: &SequenceConfig) -> String {
    let method = match (&config.train.lora, &config.train.olora) {
        (Some(_), Some(olora)) => {
            let mode = match olora.mode {
                Overlap::L1 => "l1",
                Overlap::Squared => "squared",
                Overlap::Cosine => "cosine",
            };
            let lambda: Vec<String> = olora.lambda.values().iter().map(f64::to_string).collect();
            format!("o-LoRA-{mode}({})", lambda.join(","))
        }
        (Some(_), None) => "LoRA".to_owned(),
        (None, _) => "FFT".to_owned(),
    };
    if config.replay.is_some() { method + "-Rep" } else { method }
}

/// Returns the name of a row as in the paper: `LoRA 1`, `LoRA 1,2`, `LoRA 1-3`.
pub(crate) fn row_name(method: &str, round: usize) -> String {
    match round {
        1 => format!("{method} 1"),
        2 => format!("{method} 1,2"),
        n => format!("{method} 1-{n}"),
    }
}

/// Returns the tables of a sequence: old knowledge as in the paper's Tables 1 and 2, new knowledge as in Tables 3 and
/// 4, and a summary of transfer and forgetting.
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

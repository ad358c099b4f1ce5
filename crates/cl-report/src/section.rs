//! Sections of the report, and the sources of tables and figures.

use crate::study::Model;

/// A section of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Section {
    Overview,
    OneRound,
    Sequence,
    SemiCooperative,
    FullyCooperative,
    Beyond,
    Questions,
}

impl Section {
    pub const ALL: [Section; 7] = [
        Section::Overview,
        Section::OneRound,
        Section::Sequence,
        Section::SemiCooperative,
        Section::FullyCooperative,
        Section::Beyond,
        Section::Questions,
    ];

    pub fn id(self) -> &'static str {
        match self {
            Section::Overview => "overview-section",
            Section::OneRound => "one-round",
            Section::Sequence => "sequences",
            Section::SemiCooperative => "semi-cooperative",
            Section::FullyCooperative => "fully-cooperative",
            Section::Beyond => "beyond",
            Section::Questions => "questions",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Section::Overview => "Overview",
            Section::OneRound => "One round",
            Section::Sequence => "Sequences of rounds",
            Section::SemiCooperative => "Semi-cooperative setting",
            Section::FullyCooperative => "Fully cooperative setting",
            Section::Beyond => "Rounds and cost",
            Section::Questions => "Side questions",
        }
    }

    pub fn about(self) -> &'static str {
        match self {
            Section::Overview => "Every method after its last step, on old knowledge and on the new tasks.",
            Section::OneRound => {
                "Each task learned alone, from the base model: what a method acquires, and what it costs in old knowledge."
            }
            Section::Sequence => {
                "Tasks learned one after another, each round starting from the model of the round before."
            }
            Section::SemiCooperative => {
                "Models of earlier rounds are available, but their data is not: orthogonal adapters, merges, mixtures of experts. Mixtures with trained routers are shown for comparison; these have seen all data."
            }
            Section::FullyCooperative => "All data stays at hand: joint training, and sequences with replay.",
            Section::Beyond => "How each task fares over the rounds, all scores at a glance, and time and size.",
            Section::Questions => "Comparisons beside the main one.",
        }
    }
}

/// Returns the source line: the file, and the stages in it.
pub(crate) fn source<'m, 'r: 'm>(models: impl IntoIterator<Item = &'m Model<'r>>) -> String {
    let mut stages: Vec<&str> = Vec::new();
    for row in models.into_iter().flat_map(|m| &m.rows) {
        if !stages.contains(&row.stage.as_str()) {
            stages.push(&row.stage);
        }
    }
    const SHOWN: usize = 4;
    let named = stages.iter().take(SHOWN).map(|s| format!("`{s}`")).collect::<Vec<_>>().join(", ");
    match stages.len() {
        0 => "Source: results.json.".to_owned(),
        n if n > SHOWN => format!("Source: results.json, stages {named} and {} more.", n - SHOWN),
        1 => format!("Source: results.json, stage {named}."),
        _ => format!("Source: results.json, stages {named}."),
    }
}

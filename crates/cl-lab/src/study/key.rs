//! Cache keys: what the result of a stage depends on.
//!
//! A stage makes a model (or an adapter, or a mixture), and scores it. The two have keys of their own, so that another
//! task or another setting of the evaluation does not repeat any training.

use std::path::PathBuf;

use cl_data::{Dataset, Profile};
use serde_json::{Value, json};

use super::graph::{Stage, Work};
use crate::config::Limits;
use crate::{EvalConfig, Round, RoundConfig, SequenceConfig};

/// The keys of a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StageKey {
    /// Hash of everything that the stage's model depends on.
    pub(super) made: String,
    /// Hash of everything that its scores depend on.
    pub(super) scored: String,
}

/// The inputs of a study, in addition to the work of its stages.
pub(super) struct World<'a> {
    /// Hash of the base model.
    pub(super) base: &'a str,
    pub(super) profile: Profile,
    pub(super) rounds: &'a [Round],
    /// Training data of each round.
    pub(super) datasets: &'a [Vec<Dataset>],
    /// Validation data of each round.
    pub(super) validation: &'a [Vec<Dataset>],
    /// Tasks and settings of the evaluation.
    pub(super) scoring: Value,
}

impl World<'_> {
    /// Returns the keys of all stages.
    pub(super) fn keys(&self, stages: &[Stage]) -> Vec<StageKey> {
        let mut keys: Vec<StageKey> = Vec::with_capacity(stages.len());
        for Stage { work, needs, .. } in stages {
            let of = |key: fn(&StageKey) -> &String| needs.iter().map(|&need| key(&keys[need])).collect::<Vec<_>>();
            let world = json!({"format": 4, "base": self.base, "profile": self.profile});
            let made = hash(&json!([world, self.data(work), for_training(work), of(|key| &key.made)]));
            let scored = hash(&json!([made, self.scoring, for_scores(work), of(|key| &key.scored)]));
            keys.push(StageKey { made, scored });
        }
        keys
    }

    /// Returns the hashes of the data that a stage reads itself.
    fn data(&self, work: &Work) -> Vec<&str> {
        let of_round =
            |place: usize| self.datasets[place].iter().chain(&self.validation[place]).map(|set| set.hash.as_str());
        let all = || (0..self.rounds.len()).flat_map(of_round).collect();
        match work {
            Work::Rounds(config) => {
                let place = |round: &RoundConfig| match round.joint {
                    Some(_) => None, // on the data of all rounds
                    None => self.rounds.iter().position(|other| other.name == round.name),
                };
                let places: Option<Vec<usize>> = config.rounds.iter().map(place).collect();
                places.map_or_else(all, |places| places.into_iter().flat_map(of_round).collect())
            }
            // The routing of mixtures is measured on the data of all rounds.
            Work::Blend(_) | Work::Mix { .. } | Work::Routers { .. } => all(),
            Work::Base { .. } | Work::Adapters(_) | Work::Average => Vec::new(),
        }
    }
}

fn hash(value: &Value) -> String {
    blake3::hash(value.to_string().as_bytes()).to_hex().to_string()
}

/// Returns the part of a stage's work that its model depends on: everything except how it is scored.
fn for_training(work: &Work) -> Value {
    match work {
        Work::Base { .. } => json!("base"),
        Work::Rounds(config) => {
            let rounds = config.rounds.iter().map(|round| RoundConfig { scored: None, ..round.clone() });
            let limit = Limits { train: config.limit.train, ..Limits::default() };
            let trained =
                SequenceConfig { rounds: rounds.collect(), limit, eval: EvalConfig::default(), ..(**config).clone() };
            for_scores(&Work::Rounds(Box::new(trained)))
        }
        other => for_scores(other),
    }
}

/// Returns a stage's work without the paths of model and data, whose contents are hashed, and without the
/// settings that change no result.
fn for_scores(work: &Work) -> Value {
    match work {
        Work::Rounds(config) => {
            let (model, data) = (PathBuf::new(), PathBuf::new());
            json!({"rounds": SequenceConfig { model, data, train: config.train.of_weights(), ..(**config).clone() }})
        }
        other => json!(other),
    }
}

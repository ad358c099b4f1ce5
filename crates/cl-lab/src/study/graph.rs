//! The stages of a study and their dependencies.

use std::collections::HashSet;
use std::path::PathBuf;

use cl_adapters::{Lambda, OloraConfig, Overlap};
use cl_data::{Buffer, Joint, Mixture, Replay};
use cl_merge::adapter::Space;
use cl_merge::{Profile, RescaleChoice};
use cl_moe::{BlendInit, BlendRouter, RouterConfig, RouterInit};
use cl_report::RowKind;
use cl_train::{Precision, States, TrainConfig};
use serde::Serialize;

use super::config::{Comparison, StudyConfig, Tuning};
use crate::problem::{RoundsProblem, StudyProblem};
use crate::report::{method_name, row_name};
use crate::toy::{below, rng};
use crate::{LabError, MixtureConfig, RoundConfig, SequenceConfig};

/// One stage.
#[derive(Clone, Debug)]
pub(super) struct Stage {
    /// Its name, which is also the name of its directory.
    pub(super) id: String,
    /// Indices of the stages it depends on.
    pub(super) needs: Vec<usize>,
    pub(super) work: Work,
    pub(super) row: Row,
}

/// How a stage's scores appear in the results.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) method: String,
    pub(super) kind: RowKind,
    pub(super) seed: u64,
    /// For `one_round`, the round it was trained on.
    pub(super) round: Option<usize>,
    pub(super) members: Option<usize>,
    pub(super) question: Option<&'static str>,
}

/// The work of a stage. Its serialization is part of the stage's cache key, so it contains everything that determines
/// the result, and no output paths.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Work {
    /// Scores the base model.
    Base {
        /// Whether to prepend BOS; defaults to the study's setting.
        #[serde(skip_serializing_if = "Option::is_none")]
        add_bos_token: Option<bool>,
    },
    /// Trains a sequence of rounds.
    Rounds(Box<SequenceConfig>),
    /// Combines adapters into one.
    Adapters(Combination),
    /// Averages fully fine-tuned models.
    Average,
    /// Builds a mixture of adapters.
    Blend(BlendRouter),
    /// Builds a mixture of fully fine-tuned models.
    Mix {
        router: RouterConfig,
        num_experts_per_tok: usize,
        /// For routers initialized from hidden states: number of prompts taken from each expert's round.
        #[serde(skip_serializing_if = "Option::is_none")]
        prompts: Option<usize>,
    },
    /// Trains the routers of a mixture on the data of all rounds, upsampled to equal proportions.
    Routers { train: Box<TrainConfig>, seed: u64, limit: Option<usize> },
}

/// How adapters are combined.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Combination {
    pub(super) method: &'static str,
    pub(super) space: Space,
    /// Profile: which set of definitions applies.
    pub(super) profile: Profile,
    /// Weight of each adapter.
    pub(super) weight: f64,
    pub(super) density: Option<f64>,
    pub(super) rescale: Option<RescaleChoice>,
    pub(super) seed: u64,
}

/// Number of prompts of a round from which the router rows of an expert are computed.
const PROMPTS: usize = 16;
/// The paper's density for TIES and DARE.
const DENSITY: f64 = 0.2;

/// Returns the stages of a study, each after its dependencies.
///
/// # Errors
/// Returns what is wrong with the configuration.
pub(super) fn stages(config: &StudyConfig) -> Result<Vec<Stage>, StudyProblem> {
    let mut graph = Graph::new(config)?;
    graph.add("base", vec![], Work::Base { add_bos_token: None }, Row::of("base", RowKind::Base, 0));
    for (index, &seed) in config.seeds.iter().enumerate() {
        let first = index == 0;
        let compares = |comparison| config.compares(comparison);
        // Merges and mixtures are built from one-round models, even if these are not compared themselves.
        let parts = [Comparison::OneRound, Comparison::Merge, Comparison::Mixture].into_iter().any(compares);
        let (lora, full) = if parts {
            (graph.one_rounds(Tuning::Lora, seed)?, graph.one_rounds(Tuning::Full, seed)?)
        } else {
            (Vec::new(), Vec::new())
        };
        if compares(Comparison::Sequence) {
            graph.sequence(Tuning::Full, seed, |_| ())?;
            graph.sequence(Tuning::Lora, seed, |_| ())?;
        }
        if compares(Comparison::Olora) {
            for &lambda in &config.olora.lambda {
                graph.sequence(Tuning::Lora, seed, |s| s.train.olora = Some(olora(config.olora.mode, lambda)))?;
            }
        }
        if compares(Comparison::Replay) {
            for tuning in [Tuning::Full, Tuning::Lora] {
                graph.sequence(tuning, seed, |s| s.replay = Some(replay(config, Buffer::Redrawn)))?;
            }
        }
        if compares(Comparison::Joint) {
            for tuning in [Tuning::Full, Tuning::Lora] {
                graph.joint(tuning, seed, Joint::Uniform)?;
                graph.joint(tuning, seed, Joint::Natural)?;
            }
        }
        if compares(Comparison::Merge) {
            graph.merges(&lora, &full, seed, first)?;
        }
        if compares(Comparison::Mixture) {
            graph.mixtures(&lora, &full, seed)?;
        }
        if first && compares(Comparison::Questions) {
            graph.questions(&lora, seed)?;
        }
    }
    for stage in &graph.stages {
        if let Work::Rounds(config) = &stage.work {
            let stage = || stage.id.clone();
            config.resolve_rounds().map_err(|problem| StudyProblem::StageRounds { stage: stage(), problem })?;
            let wrong = |e| StudyProblem::StageTrain { stage: stage(), source: Box::new(e) };
            config.train.validate().map_err(wrong)?;
        }
    }
    Ok(graph.stages)
}

impl StudyConfig {
    /// Returns the study's rounds as a sequence with LoRA and one with full fine-tuning; both evaluate everything that
    /// the study evaluates.
    ///
    /// # Errors
    /// Returns what is wrong with the configuration.
    pub(crate) fn sequences(&self) -> Result<[SequenceConfig; 2], StudyProblem> {
        let graph = Graph::new(self)?;
        Ok([graph.config_of(Tuning::Lora, self.seeds[0])?, graph.config_of(Tuning::Full, self.seeds[0])?])
    }
}

struct Graph<'a> {
    config: &'a StudyConfig,
    rounds: Vec<RoundConfig>,
    /// All tasks that rounds train on, in order.
    scored: Vec<String>,
    stages: Vec<Stage>,
    ids: HashSet<String>,
}

impl<'a> Graph<'a> {
    fn new(config: &'a StudyConfig) -> Result<Graph<'a>, StudyProblem> {
        let rounds = config.all_rounds();
        let count = rounds.len();
        if !config.tasks.is_empty() && !config.rounds.is_empty() {
            return Err(RoundsProblem::TasksAndRounds.into());
        }
        for (key, twice) in [
            ("seeds", twice(&config.seeds)),
            ("members", config.members.as_deref().and_then(twice)),
            ("experts", twice(&config.experts)),
            ("olora.lambda", twice(&config.olora.lambda)),
            ("columns", twice(&config.columns.iter().map(|column| column.name.as_str()).collect::<Vec<&str>>())),
        ] {
            if let Some(value) = twice {
                return Err(StudyProblem::Twice { key, value });
            }
        }
        if config.threads == Some(0) {
            return Err(StudyProblem::Threads);
        }
        for &lambda in &config.olora.lambda {
            olora(config.olora.mode, lambda).validate().map_err(|e| StudyProblem::Olora(Box::new(e)))?;
        }
        let replayed = Mixture { replay: Some(replay(config, Buffer::Redrawn)), ..Mixture::default() };
        replayed.validate(1)?;
        if let Some(&members) = config.members.iter().flatten().find(|m| !(2..=count).contains(*m)) {
            return Err(StudyProblem::Members { members, rounds: count });
        }
        if let Some(name) = config.experts.iter().find(|name| rounds.iter().all(|round| round.name != **name)) {
            return Err(StudyProblem::NoRound { name: name.clone() });
        }
        if config.seeds.is_empty() || config.seeds.iter().any(|&seed| seed > MAX_SEED) {
            return Err(StudyProblem::Seeds { most: MAX_SEED });
        }
        // Whatever a sequence checks for itself is checked before any stage runs.
        let mut graph = Graph { config, rounds, scored: Vec::new(), stages: Vec::new(), ids: HashSet::new() };
        for tuning in [Tuning::Lora, Tuning::Full] {
            let resolved = graph.config_of(tuning, 1)?.resolve_rounds()?;
            graph.scored.clear();
            for task in resolved.iter().flat_map(|round| &round.scored) {
                if !graph.scored.contains(task) {
                    graph.scored.push(task.clone());
                }
            }
        }
        Ok(graph)
    }

    fn add(&mut self, id: &str, needs: Vec<usize>, work: Work, row: Row) -> usize {
        assert!(self.ids.insert(id.to_owned()), "stage {id} is listed twice");
        self.stages.push(Stage { id: id.to_owned(), needs, work, row });
        self.stages.len() - 1
    }

    /// Returns the study's rounds as a sequence.
    fn config_of(&self, tuning: Tuning, seed: u64) -> Result<SequenceConfig, StudyProblem> {
        let config = self.config;
        let mut eval = config.eval.clone();
        if eval.tasks.is_none() && !self.scored.is_empty() {
            eval.tasks = Some(self.scored.clone());
        }
        Ok(SequenceConfig {
            model: config.model.clone(),
            data: config.data.clone(),
            tasks: Vec::new(),
            // Seeds are far apart, because a sequence adds the number of the round.
            seed: seed * SEEDS_APART,
            profile: config.profile,
            device: config.device.clone(),
            keep_models: false,
            limit: config.limit,
            train: config.train_config(tuning)?,
            mixture: MixtureConfig::default(),
            replay: None,
            validation: config.validation.clone(),
            eval,
            rounds: self.rounds.clone(),
        })
    }

    fn one_rounds(&mut self, tuning: Tuning, seed: u64) -> Result<Vec<usize>, StudyProblem> {
        let mut places = Vec::new();
        for (index, round) in self.rounds.clone().into_iter().enumerate() {
            let mut sequence = self.config_of(tuning, seed)?;
            // Use the seed that this round has in a sequence.
            sequence.seed += index as u64;
            let id = format!("one-{}-{}-{}.seed{seed}", slug(&method_name(&sequence)), index + 1, slug(&round.name));
            let row = Row::of(&method_name(&sequence), RowKind::OneRound, seed);
            sequence.rounds = vec![round];
            let row = Row { round: Some(index + 1), ..row };
            places.push(self.add(&id, vec![0], Work::Rounds(Box::new(sequence)), row));
        }
        Ok(places)
    }

    fn sequence(
        &mut self,
        tuning: Tuning,
        seed: u64,
        change: impl FnOnce(&mut SequenceConfig),
    ) -> Result<usize, StudyProblem> {
        let mut sequence = self.config_of(tuning, seed)?;
        change(&mut sequence);
        let method = method_name(&sequence);
        let id = format!("sequence-{}.seed{seed}", slug(&method));
        let row = Row::of(&method, RowKind::Sequence, seed);
        Ok(self.add(&id, vec![0], Work::Rounds(Box::new(sequence)), row))
    }

    /// Adds joint training on the data of all rounds at once.
    fn joint(&mut self, tuning: Tuning, seed: u64, joint: Joint) -> Result<usize, StudyProblem> {
        let mut sequence = self.config_of(tuning, seed)?;
        let own = |round: &RoundConfig| (round.format, round.columns.clone());
        let (format, columns) = own(&self.rounds[0]);
        if self.rounds.iter().any(|round| own(round) != (format, columns.clone())) {
            return Err(StudyProblem::Joint);
        }
        let data = self.rounds.iter().flat_map(|round| match round.data.as_slice() {
            [] => vec![PathBuf::from(&round.name)],
            data => data.to_vec(),
        });
        let method = if tuning == Tuning::Lora { "Joint-LoRA" } else { "Joint-FFT" };
        let (method, question) = match joint {
            Joint::Uniform => (method.to_owned(), None),
            _ => (format!("{method} (natural)"), Some("Joint training: upsampled to equal shares or as the data is")),
        };
        sequence.rounds = vec![RoundConfig {
            data: data.collect(),
            scored: Some(self.scored.clone()),
            format,
            columns,
            joint: Some(joint),
            train: self.config.joint.clone(),
            ..RoundConfig::of_task("joint")
        }];
        let id = format!("{}.seed{seed}", slug(&method));
        let row = Row { question, ..Row::of(&method, RowKind::Joint, seed) };
        Ok(self.add(&id, vec![0], Work::Rounds(Box::new(sequence)), row))
    }

    /// Adds merges of one-round models: all numbers of models for the first seed, only the largest for other seeds.
    fn merges(&mut self, lora: &[usize], full: &[usize], seed: u64, every_number: bool) -> Result<(), StudyProblem> {
        let all = lora.len();
        let numbers: Vec<usize> = match &self.config.members {
            Some(members) => members.clone(),
            None => (2..=all).collect(),
        };
        for members in numbers.into_iter().filter(|m| every_number || *m == all) {
            let merged = |method: &str| Row { members: Some(members), ..Row::of(method, RowKind::Merge, seed) };
            let id = |name: &str| format!("{name}-{members}.seed{seed}");
            self.add(&id("merge-fft-average"), full[..members].to_vec(), Work::Average, merged("FFT-average"));
            for (name, label, combination) in adapter_merges(members, seed) {
                let row = merged(label);
                self.add(&id(name), lora[..members].to_vec(), Work::Adapters(combination), row);
            }
        }
        Ok(())
    }

    /// Adds mixtures with untrained routers, with prototypes of each expert, and with routers trained from the
    /// prototypes.
    fn mixtures(&mut self, lora: &[usize], full: &[usize], seed: u64) -> Result<(), StudyProblem> {
        let mixed =
            |method: &str, members| Row { members: Some(members), ..Row::of(method, RowKind::MixtureOfExperts, seed) };
        let trained = self.routers(seed)?;
        for (init, name) in
            [(BlendInit::Random, "untrained"), (BlendInit::Arrow, "arrow"), (BlendInit::Spectr, "spectr")]
        {
            let router = BlendRouter { init, ..BlendRouter::default() };
            let (id, row) = (format!("blend-{name}.seed{seed}"), mixed(&format!("MoE-LoRA ({name})"), lora.len()));
            let blend = self.add(&id, lora.to_vec(), Work::Blend(router), row);
            if init == BlendInit::Arrow {
                let row = mixed("MoE-LoRA (trained)", lora.len());
                self.add(&format!("blend-trained.seed{seed}"), vec![blend], trained.clone(), row);
            }
        }
        let chosen: Vec<usize> =
            (0..full.len()).filter(|&i| self.config.experts.contains(&self.rounds[i].name)).collect();
        let all: Vec<usize> = (0..full.len()).collect();
        for experts in [chosen, all] {
            let count = experts.len();
            if count < 2 || self.ids.contains(&format!("mix-{count}.seed{seed}")) {
                continue;
            }
            let needs: Vec<usize> = experts.iter().map(|&i| full[i]).collect();
            let mix = |init, prompts| Work::Mix {
                router: RouterConfig { init, ..RouterConfig::default() },
                num_experts_per_tok: 2,
                prompts,
            };
            let row = |name: &str| mixed(&format!("MoE-FFT ({name})"), count);
            let id = |name: &str| format!("mix-{name}{count}.seed{seed}");
            self.add(&id(""), needs.clone(), mix(RouterInit::Random, None), row("untrained"));
            let states = mix(RouterInit::States, Some(PROMPTS));
            let prototypes = self.add(&id("prototypes-"), needs, states, row("prototypes"));
            self.add(&id("trained-"), vec![prototypes], trained.clone(), row("trained"));
        }
        Ok(())
    }

    /// Returns the settings of router training, the same for all mixtures.
    fn routers(&self, seed: u64) -> Result<Work, StudyProblem> {
        let train = Box::new(self.config.train_config(Tuning::Router)?);
        Ok(Work::Routers { train, seed: seed * SEEDS_APART, limit: self.config.limit.train })
    }

    /// Adds the questions that the paper leaves open.
    fn questions(&mut self, lora: &[usize], seed: u64) -> Result<(), StudyProblem> {
        if !lora.is_empty() {
            for (rescale, name) in
                [(RescaleChoice::None, "DARE-TIES (not rescaled)"), (RescaleChoice::Density, "DARE-TIES (rescaled)")]
            {
                let combination = Combination { rescale: Some(rescale), ..dare_ties(Space::Delta, seed) };
                let members = Some(lora.len());
                let question = Some("DARE with and without rescaling what is kept");
                let row = Row { members, question, ..Row::of(name, RowKind::Merge, seed) };
                self.add(&format!("question-{}", slug(name)), lora.to_vec(), Work::Adapters(combination), row);
            }
        }
        let terms = "Definitions of o-LoRA's term, each at its default strength";
        for mode in [Overlap::L1, Overlap::Squared, Overlap::Cosine] {
            let change = |s: &mut SequenceConfig| s.train.olora = Some(olora(mode, mode.lambda()));
            let mut named = self.config_of(Tuning::Lora, seed)?;
            change(&mut named);
            self.question(terms, &format!("{} (default strength)", method_name(&named)), Tuning::Lora, seed, change)?;
        }
        let (buffer, fixed) =
            ("Replayed rows: drawn anew in each epoch, or a fixed buffer", replay(self.config, Buffer::Fixed));
        self.question(buffer, "LoRA-Rep (fixed buffer)", Tuning::Lora, seed, |s| s.replay = Some(fixed))?;
        let weights = "Weights and optimizer states in f32, or all in bf16";
        self.question(weights, "FFT (pure bf16)", Tuning::Full, seed, |s| {
            (s.train.precision, s.train.states) = (Precision::Bf16, States::Pure);
        })?;
        self.orders(seed)?;
        // Both are scored, because tokenizers differ in which of the two is the default.
        for (add, name) in [(true, "base (with BOS)"), (false, "base (without BOS)")] {
            let row = Row { question: Some("BOS in front of every text"), ..Row::of(name, RowKind::Base, seed) };
            let work = Work::Base { add_bos_token: Some(add) };
            self.add(&format!("question-{}", slug(name)), vec![0], work, row);
        }
        Ok(())
    }

    /// Adds sequences in other orders; their rows contain the number of the order instead of the seed.
    fn orders(&mut self, seed: u64) -> Result<(), StudyProblem> {
        const QUESTION: &str = "Order of the rounds: the given one reversed and others drawn, ± over the orders";
        for (order, rounds) in orders(&self.rounds, self.config.orders).into_iter().enumerate() {
            for (tuning, method) in [(Tuning::Lora, "LoRA"), (Tuning::Full, "FFT")] {
                let mut sequence = self.config_of(tuning, seed)?;
                sequence.rounds.clone_from(&rounds);
                let (id, number) = (format!("order-{}-{}.seed{seed}", slug(method), order + 1), order as u64 + 1);
                let row = Row {
                    question: Some(QUESTION),
                    ..Row::of(&format!("{method} (other orders)"), RowKind::Sequence, number)
                };
                self.add(&id, vec![0], Work::Rounds(Box::new(sequence)), row);
            }
        }
        Ok(())
    }

    fn question(
        &mut self,
        question: &'static str,
        method: &str,
        tuning: Tuning,
        seed: u64,
        change: impl FnOnce(&mut SequenceConfig),
    ) -> Result<(), StudyProblem> {
        let mut sequence = self.config_of(tuning, seed)?;
        change(&mut sequence);
        let row = Row { question: Some(question), ..Row::of(method, RowKind::Sequence, seed) };
        self.add(&format!("question-{}", slug(method)), vec![0], Work::Rounds(Box::new(sequence)), row);
        Ok(())
    }
}

/// Returns up to `count` other orders of the rounds: the reverse order, then random ones, each drawn with its number as
/// the seed.
fn orders(rounds: &[RoundConfig], count: usize) -> Vec<Vec<RoundConfig>> {
    const TRIES: u64 = 1000;
    let reversed: Vec<RoundConfig> = rounds.iter().rev().cloned().collect();
    let drawn = (0..TRIES).map(|number| {
        let (mut rng, mut order) = (rng(number, "order"), rounds.to_vec());
        (1..order.len()).rev().for_each(|i| order.swap(i, below(&mut rng, i + 1)));
        order
    });
    let mut all: Vec<Vec<RoundConfig>> = Vec::new();
    for order in std::iter::once(reversed).chain(drawn) {
        if all.len() == count {
            break;
        }
        if order != rounds && !all.contains(&order) {
            all.push(order);
        }
    }
    all
}

/// Returns the first value that occurs twice, as text.
fn twice<T: PartialEq + ToString>(values: &[T]) -> Option<String> {
    let again = values.iter().enumerate().find(|(i, value)| values[..*i].contains(value));
    again.map(|(_, value)| value.to_string())
}

/// Distance between the seeds of sequences. Up to this many rounds, sequences with adjacent seeds share no seed.
const SEEDS_APART: u64 = 1000;
/// Largest seed of a study. The seed of a sequence is written as TOML, whose integers are signed.
const MAX_SEED: u64 = i64::MAX as u64 / SEEDS_APART - 1;

/// Returns the merges of adapters: identifier, name in tables, and settings. TIES and DARE-TIES are the paper's,
/// applied to the factors A and B separately; those on ΔW are the methods as defined by their authors.
fn adapter_merges(members: usize, seed: u64) -> [(&'static str, &'static str, Combination); 5] {
    let average = Combination {
        method: "linear",
        space: Space::Delta,
        profile: Profile::Method,
        weight: 1.0 / members as f64,
        density: None,
        rescale: None,
        seed,
    };
    let ties = |space| Combination { method: "ties", ..dare_ties(space, seed) };
    [
        ("merge-lora-average", "LoRA-average", average),
        ("merge-ties", "TIES", ties(Space::Factors)),
        ("merge-dare-ties", "DARE-TIES", dare_ties(Space::Factors, seed)),
        ("merge-ties-delta", "TIES (ΔW)", ties(Space::Delta)),
        ("merge-dare-ties-delta", "DARE-TIES (ΔW)", dare_ties(Space::Delta, seed)),
    ]
}

fn dare_ties(space: Space, seed: u64) -> Combination {
    let profile = if space == Space::Factors { Profile::Paper } else { Profile::Method };
    Combination { method: "dare_ties", space, profile, weight: 1.0, density: Some(DENSITY), rescale: None, seed }
}

fn olora(mode: Overlap, lambda: f64) -> OloraConfig {
    OloraConfig { mode, lambda: Lambda::Every(lambda), ..OloraConfig::default() }
}

fn replay(config: &StudyConfig, buffer: Buffer) -> Replay {
    Replay { fraction: config.replay, buffer }
}

impl Row {
    fn of(method: &str, kind: RowKind, seed: u64) -> Row {
        Row { method: method.to_owned(), kind, seed, round: None, members: None, question: None }
    }

    /// Returns the label of this row in the paper's Tables 1 to 6; for a sequence, the row after `round`. Of most
    /// sequences, the paper has only the scores after the last round.
    pub(super) fn paper(&self, round: Option<usize>, is_last: bool) -> Option<String> {
        match (self.kind, round, self.question) {
            (RowKind::Base, _, None) => Some("base".to_owned()),
            (RowKind::Sequence, Some(round), None) if ["LoRA", "FFT"].contains(&self.method.as_str()) => {
                Some(row_name(&self.method, round))
            }
            (RowKind::Sequence, _, None) if !is_last => None,
            (RowKind::Sequence | RowKind::Joint, _, None) => Some(self.method.clone()),
            _ => None,
        }
    }
}

/// Converts a name to a part of a directory name, using only letters, digits, dots and dashes.
fn slug(name: &str) -> String {
    let plain = name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' });
    let joined = plain.collect::<String>().split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-");
    if joined.is_empty() { "round".to_owned() } else { joined }
}

/// Selects the stages whose names start with one of `only`, and their dependencies.
pub(super) fn select(stages: &[Stage], only: &[String]) -> Result<Vec<bool>, LabError> {
    let mut wanted: Vec<bool> =
        stages.iter().map(|s| only.is_empty() || only.iter().any(|start| s.id.starts_with(start.as_str()))).collect();
    if let Some(start) = only.iter().find(|start| !stages.iter().any(|s| s.id.starts_with(start.as_str()))) {
        return Err(StudyProblem::NoStage { start: start.clone() }.into());
    }
    for place in (0..stages.len()).rev() {
        if wanted[place] {
            stages[place].needs.iter().for_each(|&need| wanted[need] = true);
        }
    }
    Ok(wanted)
}

//! Estimates steps, tokens, time, disk space and memory of each stage, before anything runs.
//!
//! Everything is computed from sizes: those of the model and the data if available, otherwise those of the paper.

use cl_data::{Dataset, Encoding, Mixture, Profile};
use cl_eval::{Request, Task};
use cl_train::{Plan, Precision, TrainConfig};
use serde_json::{Map, Value};

use super::config::StudyConfig;
use super::graph::{Stage, Work, select, stages};
use super::work::Record;
use crate::shape::Shape;
use crate::{Gpus, LabError, MemoryPlan, SequenceConfig, StudyOptions};

/// Estimates for a study.
#[derive(Clone, Debug)]
pub struct StudyPlan {
    /// The stages, in order.
    pub stages: Vec<PlannedStage>,
    /// How the time estimates were obtained, one line per kind of work.
    pub rates: Vec<String>,
    /// Warnings about data and settings, as from [`check_sequence`](crate::check_sequence); each starts with
    /// `warning: `.
    pub warnings: Vec<String>,
    /// Disk space used after the study, in bytes.
    pub kept_bytes: u64,
    /// Peak disk space, in bytes, with one stage at a time.
    pub peak_bytes: u64,
}

/// Estimates for one stage.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedStage {
    /// Its name.
    pub name: String,
    /// Whether it is complete.
    pub done: bool,
    /// Optimizer steps.
    pub steps: u64,
    /// Number of training tokens.
    pub train_tokens: u64,
    /// Number of tokens scored.
    pub scored_tokens: u64,
    /// Estimated duration in seconds; for a completed stage, the measured one.
    pub seconds: f64,
    /// Disk space used when it ends, in bytes, including models that later stages need.
    pub bytes: u64,
    /// Estimated peak memory of its process, in bytes; with several GPUs, of each process.
    pub memory: u64,
    /// For training on several GPUs: the lowest `zero_stage` that fits. For a stage without training that needs more
    /// memory than one GPU has: [`ZeroStage::None`].
    pub zero_stage: Option<ZeroStage>,
}

/// The lowest `zero_stage` with which training fits on several GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ZeroStage {
    /// The lowest stage that fits.
    Fits(u8),
    /// No stage fits.
    None,
}

/// Sizes of the model and the data.
#[derive(Clone, Debug)]
pub struct StudySizes {
    /// The model's `config.json`.
    pub model: Map<String, Value>,
    /// Data sets of each round.
    pub rounds: Vec<Vec<SetSize>>,
    /// Number of tokens scored when a model is evaluated once on all tasks.
    pub scored_tokens: u64,
}

/// Size of a data set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SetSize {
    /// Number of training rows.
    pub rows: usize,
    /// Mean number of tokens per row, after truncation.
    pub tokens: f64,
}

/// Number of rows from which the mean length is estimated.
const SAMPLE: usize = 200;
/// Number of documents per task from which the mean length is estimated.
const SAMPLED_DOCUMENTS: usize = 20;

impl StudySizes {
    /// Measures the sizes of the model and the data.
    pub(super) fn of(
        model: Map<String, Value>,
        datasets: &[Vec<Dataset>],
        encoding: Encoding<'_>,
        tasks: &[Box<dyn Task>],
        longest: Option<usize>,
    ) -> Result<StudySizes, LabError> {
        let size = |set: &Dataset| {
            let first = &set.examples[..set.examples.len().min(SAMPLE)];
            let rows = encoding.examples(first).map_err(LabError::data(&set.path))?;
            let tokens: usize = rows.iter().map(|row| row.input_ids.len()).sum();
            Ok(SetSize { rows: set.examples.len(), tokens: tokens as f64 / rows.len().max(1) as f64 })
        };
        let rounds = datasets.iter().map(|sets| sets.iter().map(size).collect()).collect::<Result<_, LabError>>()?;
        let count = |text: &str| encoding.tokenizer.encode(text, false).map_or(0, |ids| ids.len());
        let cut = |tokens: usize| longest.map_or(tokens, |most| tokens.min(most));
        let request = |task: &dyn Task, document: usize| match task.request(document) {
            Request::Generate(request) => cut(count(&request.prompt) + request.max_new_tokens),
            Request::Continuation(one) => cut(count(&one.context) + count(&one.continuation)),
            // A context shared by several continuations is computed once.
            Request::Loglikelihood(all) => {
                let context = all.first().map_or(0, |first| count(&first.context));
                cut(context) + all.iter().map(|one| count(&one.continuation)).sum::<usize>()
            }
        };
        let of_task = |task: &dyn Task| {
            let sampled = task.len().min(SAMPLED_DOCUMENTS);
            let tokens: usize = (0..sampled).map(|document| request(task, document)).sum();
            (tokens as f64 / sampled.max(1) as f64 * task.len() as f64) as u64
        };
        Ok(StudySizes { model, rounds, scored_tokens: tasks.iter().map(|task| of_task(task.as_ref())).sum() })
    }

    /// Returns the sizes of the paper: Llama-3-8B, 5,000 rows for each task of TRACE and the 395,000 rows of
    /// MetaMathQA. Numbers of rows and documents are those of the paper and its data sets. Lengths are means over
    /// samples of these data sets in SmolLM2's tokens, truncated to 1,024; that of MetaMathQA is assumed to be 270.
    pub fn of_paper() -> StudySizes {
        let model = serde_json::json!({
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
        });
        let trace = [262.0, 80.0, 803.0, 455.0, 316.0, 858.0].map(|tokens| vec![SetSize { rows: 5000, tokens }]);
        let math = vec![SetSize { rows: 395_000, tokens: 270.0 }];
        // Number of documents, and tokens per document with the answer: TRACE's six tasks, GSM8K with 5 and with 8
        // few-shot examples, and the seven tasks of old knowledge.
        const TESTS: [(u64, u64); 15] = [
            (2000, 315),
            (496, 89),
            (2000, 1753),
            (2000, 1019),
            (2000, 92),
            (200, 1160),
            (1319, 1295),
            (1319, 1100),
            (14_042, 115),
            (1172, 58),
            (1221, 69),
            (10_042, 96),
            (500, 28),
            (1838, 57),
            (1267, 44),
        ];
        let Value::Object(model) = model else { unreachable!("an object is written above") };
        let scored_tokens = TESTS.iter().map(|(documents, tokens)| documents * tokens).sum();
        StudySizes { model, rounds: trace.into_iter().chain([math]).collect(), scored_tokens }
    }
}

/// Amount of work of a stage.
#[derive(Clone, Copy, Debug, Default)]
struct Effort {
    steps: u64,
    train_tokens: u64,
    /// Number of full evaluations.
    scorings: u64,
    /// Bytes that are kept, and bytes of models that are removed once no stage needs them.
    kept: u64,
    models: u64,
    memory: u64,
    zero_stage: Option<ZeroStage>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Scoring,
    Lora,
    Full,
}

/// Throughput in tokens per second.
struct Rates {
    scoring: f64,
    lora: f64,
    full: f64,
    lines: Vec<String>,
}

/// Assumed throughput in FLOP/s if there are no measurements: one CPU thread, and 40 % of an A100's nominal bf16 rate.
const OF_A_THREAD: f64 = 8e10;
const OF_A_GPU: f64 = 1.25e14;

impl Rates {
    /// Returns assumed rates. A token takes two operations per parameter in the forward pass, two in the backward pass,
    /// and in full fine-tuning two more for the gradients of the weights.
    fn stated(shape: &Shape, config: &StudyConfig, gpus: Option<&Gpus>) -> Rates {
        let (speed, of) = match (gpus, config.device.as_str()) {
            (Some(gpus), _) => {
                (gpus.flops().unwrap_or(OF_A_GPU * gpus.count as f64), format!("{} GPUs together", gpus.count))
            }
            (None, cuda) if cuda.starts_with("cuda") => (OF_A_GPU, "a GPU".to_owned()),
            _ => {
                let threads = config.threads.unwrap_or(1);
                (OF_A_THREAD * f64::from(threads), format!("{threads} thread{}", if threads == 1 { "" } else { "s" }))
            }
        };
        let operations = shape.parameters() as f64;
        let lines = vec![format!("assumed where not measured: {speed:.1e} operations per second on {of}")];
        Rates {
            scoring: speed / (2.0 * operations),
            lora: speed / (4.0 * operations),
            full: speed / (6.0 * operations),
            lines,
        }
    }

    /// Replaces assumed rates by those measured in completed stages.
    fn measure(&mut self, done: &[(Effort, f64)], scored_tokens: u64) {
        let sum = |kind: Kind, of: &dyn Fn(&(Effort, f64)) -> f64| -> f64 {
            done.iter().filter(|(effort, _)| effort.kind == kind).map(of).sum()
        };
        let scored = |e: &Effort| (e.scorings * scored_tokens) as f64;
        let seconds = sum(Kind::Scoring, &|d| d.1);
        if seconds > 0.0 {
            self.scoring = (sum(Kind::Scoring, &|d| scored(&d.0)) / seconds).max(f64::MIN_POSITIVE);
            self.lines.push(format!("measured: scoring {:.0} tokens/s", self.scoring));
        }
        for (kind, name) in [(Kind::Lora, "LoRA"), (Kind::Full, "full fine-tuning")] {
            let seconds = sum(kind, &|d| d.1 - scored(&d.0) / self.scoring);
            let tokens = sum(kind, &|d| d.0.train_tokens as f64);
            if seconds > 0.0 && tokens > 0.0 {
                let rate = if kind == Kind::Lora { &mut self.lora } else { &mut self.full };
                *rate = tokens / seconds;
                self.lines.push(format!("measured: {name} {:.0} tokens/s", tokens / seconds));
            }
        }
    }

    fn seconds(&self, effort: &Effort, scored_tokens: u64) -> f64 {
        let rate = if effort.kind == Kind::Full { self.full } else { self.lora };
        effort.train_tokens as f64 / rate + (effort.scorings * scored_tokens) as f64 / self.scoring
    }
}

/// Estimates [`run_study`](crate::run_study) for a model and data of these sizes, which do not have to be present.
///
/// ```
/// let config = cl_lab::read_study("paper.toml".as_ref(), cl_lab::PAPER_STUDY, &[])?;
/// let plan = cl_lab::sketch_study(&config, &cl_lab::StudySizes::of_paper(), &cl_lab::StudyOptions::default())?;
/// let math = plan.stages.iter().find(|stage| stage.name == "one-lora-7-math.seed42").unwrap();
/// assert_eq!(math.steps, 6 * 3085);
/// # Ok::<(), cl_lab::LabError>(())
/// ```
///
/// # Errors
/// Returns [`LabError::Study`] if the configuration is invalid.
pub fn sketch_study(config: &StudyConfig, sizes: &StudySizes, options: &StudyOptions) -> Result<StudyPlan, LabError> {
    let stages = stages(config)?;
    let wanted = select(&stages, &options.only)?;
    let records = vec![None; stages.len()];
    plan(config, &stages, &wanted, &records, sizes, options)
}

/// Plans the given stages, some of which may be complete.
pub(super) fn plan(
    config: &StudyConfig,
    stages: &[Stage],
    wanted: &[bool],
    records: &[Option<Record>],
    sizes: &StudySizes,
    options: &StudyOptions,
) -> Result<StudyPlan, LabError> {
    let (keep_models, gpus) = (options.keep_models, options.gpus.as_ref());
    let shape = Shape::of(&sizes.model);
    let names: Vec<String> = config.all_rounds().into_iter().map(|round| round.name).collect();
    let paper = config.profile == Profile::Paper;
    let scored_in = if config.eval.precision == Precision::Bf16 { 2 } else { 4 };
    let planner = Planner { shape: &shape, sizes, names: &names, paper, scored_in, gpus };
    let efforts = stages.iter().map(|stage| planner.effort(stage)).collect::<Result<Vec<Effort>, LabError>>()?;
    let mut rates = Rates::stated(&shape, config, gpus);
    let done: Vec<(Effort, f64)> =
        efforts.iter().zip(records).filter_map(|(effort, record)| Some((*effort, record.as_ref()?.seconds))).collect();
    rates.measure(&done, sizes.scored_tokens);
    let (mut kept_bytes, mut peak_bytes) = (0, 0);
    let mut planned = Vec::new();
    // Stages that are not selected now may be run later.
    let later = |p: usize| !wanted[p] && records[p].is_none();
    let stays = |need: usize| keep_models || (0..stages.len()).any(|p| later(p) && stages[p].needs.contains(&need));
    for place in (0..stages.len()).filter(|&place| wanted[place]) {
        let (effort, record) = (&efforts[place], &records[place]);
        // Models of earlier stages that this stage or a later one is built from.
        let waiting = |need: &usize| (place..stages.len()).any(|p| wanted[p] && stages[p].needs.contains(need));
        let models: u64 =
            (0..place).filter(|p| wanted[*p] && !stays(*p) && waiting(p)).map(|p| efforts[p].models).sum();
        // A sequence briefly holds the models of two rounds.
        let own = if effort.scorings > 1 { 2 } else { 1 } * effort.models;
        peak_bytes = peak_bytes.max(kept_bytes + effort.kept + models + own);
        kept_bytes += effort.kept + if stays(place) { effort.models } else { 0 };
        let seconds = record.as_ref().map_or_else(|| rates.seconds(effort, sizes.scored_tokens), |r| r.seconds);
        // A stage that does not train runs on a single GPU.
        let too_large = gpus.filter(|gpus| effort.memory > gpus.memory).map(|_| ZeroStage::None);
        planned.push(PlannedStage {
            name: stages[place].id.clone(),
            done: record.is_some(),
            steps: effort.steps,
            train_tokens: effort.train_tokens,
            scored_tokens: effort.scorings * sizes.scored_tokens,
            seconds,
            bytes: effort.kept + effort.models,
            memory: effort.memory,
            zero_stage: effort.zero_stage.or(too_large),
        });
    }
    let warnings = Vec::new();
    Ok(StudyPlan { stages: planned, rates: rates.lines, warnings, kept_bytes, peak_bytes: peak_bytes.max(kept_bytes) })
}

struct Planner<'a> {
    shape: &'a Shape,
    sizes: &'a StudySizes,
    /// Names of the study's rounds.
    names: &'a [String],
    paper: bool,
    /// Bytes per weight while a model is scored.
    scored_in: u64,
    gpus: Option<&'a Gpus>,
}

impl Planner<'_> {
    fn effort(&self, stage: &Stage) -> Result<Effort, LabError> {
        let shape = self.shape;
        let members = stage.row.members.unwrap_or(0) as u64;
        // Scoring needs little memory besides the model.
        let scoring = Effort { scorings: 1, memory: shape.parameters() * self.scored_in, ..Effort::default() };
        // Size of an adapter of the usual rank, for stages that do not specify one.
        let adapter = shape.adapter(8) * 4;
        let parameters = shape.parameters() + members.saturating_sub(1) * shape.mlp();
        let experts = parameters * shape.bytes_per_weight;
        Ok(match &stage.work {
            Work::Base { .. } => scoring,
            Work::Rounds(config) => {
                let effort = self.rounds(config)?;
                // For an open question, only the last round of a sequence is scored.
                Effort { scorings: if stage.row.question.is_some() { 1 } else { effort.scorings }, ..effort }
            }
            Work::Adapters(_) => Effort { kept: adapter, ..scoring },
            Work::Average => Effort { models: shape.bytes(), ..scoring },
            Work::Blend(_) => Effort { kept: members * adapter, ..scoring },
            Work::Mix { .. } => Effort { models: experts, memory: parameters * self.scored_in, ..scoring },
            Work::Routers { train, .. } => {
                let sets: Vec<SetSize> = self.sizes.rounds.concat();
                let mixture = Mixture { joint: cl_data::Joint::Uniform, replay: None };
                let own: Vec<usize> = sets.iter().map(|set| set.rows).collect();
                let (steps, train_tokens) = self.training(&mixture.rows_per_epoch(&[], &own), &sets, train)?;
                let memory = shape.training(tokens_at_once(&sets, train), train);
                let of_adapters = stage.id.starts_with("blend");
                let (kept, models) = if of_adapters { (members * adapter, 0) } else { (0, experts) };
                let size = if train.precision == Precision::Bf16 { 2 } else { 4 };
                let more = if of_adapters { members * shape.adapter(8) } else { parameters - shape.parameters() };
                let memory = memory + size * more;
                Effort { steps, train_tokens, kept, models, memory, kind: Kind::Lora, ..scoring }
            }
        })
    }

    fn rounds(&self, config: &SequenceConfig) -> Result<Effort, LabError> {
        let shape = self.shape;
        let mut effort = Effort { models: shape.bytes(), ..Effort::default() };
        let mut earlier: Vec<Vec<SetSize>> = Vec::new();
        for round in config.resolve_rounds()? {
            let place = self.names.iter().position(|name| *name == round.name);
            // A round that is not one of the study's rounds uses the data of all of them.
            let own = place.map_or_else(|| self.sizes.rounds.concat(), |place| self.sizes.rounds[place].clone());
            let replayed = if config.replay.is_some() { earlier.as_slice() } else { &[] };
            let rows = |sets: &[SetSize]| sets.iter().map(|set| set.rows).collect::<Vec<usize>>();
            let sizes: Vec<Vec<usize>> = replayed.iter().map(|sets| rows(sets)).collect();
            let lengths = round.mixture.rows_per_epoch(&sizes, &rows(&own));
            let sets: Vec<SetSize> = replayed.iter().flatten().chain(&own).copied().collect();
            let (steps, tokens) = self.training(&lengths, &sets, &round.train)?;
            effort.steps += steps;
            effort.train_tokens += tokens;
            effort.scorings += 1;
            let (memory, zero_stage) = self.memory(&sets, &round.train);
            effort.memory = effort.memory.max(memory);
            effort.zero_stage = effort.zero_stage.max(zero_stage);
            match &round.train.lora {
                Some(lora) => (effort.kept, effort.kind) = (effort.kept + shape.adapter(lora.r as u64) * 4, Kind::Lora),
                None => effort.kind = Kind::Full,
            }
            earlier.push(own);
        }
        Ok(effort)
    }

    /// Returns the memory of training and, on several GPUs, the lowest `zero_stage` that fits.
    fn memory(&self, sets: &[SetSize], train: &TrainConfig) -> (u64, Option<ZeroStage>) {
        let Some(gpus) = self.gpus else {
            return (self.shape.training(tokens_at_once(sets, train), train), None);
        };
        let plan = MemoryPlan::new(&self.sizes.model, train, gpus);
        let fits = plan.fits(gpus.memory);
        let stage = usize::from(fits.unwrap_or(3)).min(plan.stages.len() - 1);
        (plan.stages[stage].total(), Some(fits.map_or(ZeroStage::None, ZeroStage::Fits)))
    }

    /// Returns the steps and tokens of training on `lengths` rows of each data set per epoch.
    fn training(&self, lengths: &[usize], sets: &[SetSize], train: &TrainConfig) -> Result<(u64, u64), LabError> {
        let rows: usize = lengths.iter().sum();
        let steps = Plan::new(rows, train, self.paper)?.total_steps;
        let tokens: f64 = lengths.iter().zip(sets).map(|(&rows, set)| rows as f64 * set.tokens).sum();
        let batch = (train.micro_batch_size * train.gradient_accumulation_steps) as u64;
        let most = if train.max_steps.is_some() { u64::MAX } else { train.epochs.saturating_mul(rows as u64) };
        let trained = steps.saturating_mul(batch).min(most);
        Ok((steps, (trained as f64 * tokens / rows.max(1) as f64) as u64))
    }
}

/// Returns the number of tokens in a micro-batch of the data set with the longest rows.
fn tokens_at_once(sets: &[SetSize], train: &TrainConfig) -> u64 {
    let longest = sets.iter().map(|set| set.tokens).fold(0.0, f64::max);
    (longest * train.micro_batch_size as f64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_8b_has_the_parameters_that_it_is_named_after() {
        let shape = Shape::of(&StudySizes::of_paper().model);
        // The published Llama-3-8B has 8,030,261,248 parameters.
        assert_eq!(shape.parameters(), 8_030_261_248);
        // Two matrices of rank 8 for each of seven projections: 16 × 4096 + …, computed by hand, times 32 layers.
        assert_eq!(shape.adapter(8), 32 * 8 * (8192 + 2 * 5120 + 8192 + 3 * 18_432));
    }

    #[test]
    fn measured_stages_take_the_place_of_assumptions() {
        let shape = Shape::of(&StudySizes::of_paper().model);
        let mut rates = Rates::stated(&shape, &StudyConfig::default(), None);
        let scoring = Effort { scorings: 1, ..Effort::default() };
        let lora = Effort { scorings: 2, train_tokens: 500, kind: Kind::Lora, ..Effort::default() };
        // 100 tokens in 10 s are 10 per second; of 30 s, two scorings of 10 s leave 10 s for 500 tokens.
        rates.measure(&[(scoring, 10.0), (lora, 30.0)], 100);
        assert_eq!((rates.scoring, rates.lora), (10.0, 50.0));
        assert_eq!(rates.seconds(&lora, 100), 30.0);
        assert!(rates.full < 1e6 && rates.lines.len() == 3);
    }

    #[test]
    fn on_several_gpus_a_training_takes_the_memory_that_cl_plan_says() {
        let config = crate::read_study("paper.toml".as_ref(), crate::PAPER_STUDY, &[]).unwrap();
        let sizes = StudySizes::of_paper();
        let gpus = Gpus { count: 8, name: Some("A100".to_owned()), memory: 80_000_000_000 };
        let plan = |gpus| {
            // Only rounds without training settings of their own.
            let only = ["one-lora-1", "one-lora-2", "one-fft-1", "one-fft-2"].map(str::to_owned).to_vec();
            let options = StudyOptions { only, gpus, ..StudyOptions::default() };
            sketch_study(&config, &sizes, &options).unwrap()
        };
        let (eight, alone) = (plan(Some(gpus.clone())), plan(None));
        for (stage, own) in eight.stages.iter().zip(&alone.stages).filter(|(stage, _)| stage.steps > 0) {
            let full = stage.name.starts_with("one-fft");
            let [lora, all] = config.sequences().unwrap();
            let train = if full { all.train } else { lora.train };
            let expected = MemoryPlan::new(&sizes.model, &train, &gpus);
            let lowest = expected.fits(gpus.memory);
            assert_eq!(stage.zero_stage, Some(lowest.map_or(ZeroStage::None, ZeroStage::Fits)), "{}", stage.name);
            assert_eq!(stage.memory, expected.stages[usize::from(lowest.unwrap_or(3))].total());
            assert!((stage.steps, own.zero_stage) == (own.steps, None) && stage.seconds < own.seconds);
        }
    }
}

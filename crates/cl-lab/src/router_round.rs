//! Training of a mixture's routers: the training loop of a round, with everything except the routers frozen.

use std::path::{Path, PathBuf};

use cl_checkpoint::files::write_file;
use cl_checkpoint::{Interrupt, Manifest};
use cl_data::{Dataset, Encoded, Mixture as DataMixture};
use cl_model::Decoder;
use cl_moe::{MixConfig, Mixture, RouterWeights, expert_name, save_mixture_with_routers, save_model_with_routers};
use cl_torch::tch::{Device, Kind, Tensor};
use cl_train::{Ranks, TrainConfig, TrainData, TrainReport, train};
use serde_json::json;

use crate::check::{Checked, require_router};
use crate::model_dir::{mixture_error, mixture_hash, open_mixture, open_model, verify};
use crate::observe::tell;
use crate::output::{RunDir, discard, to_toml};
use crate::round::{clean_up, encode, names, plan_rows, stop_if_asked};
use crate::routing::{RoutingReport, routing_report};
use crate::routing_heat_map::heat_map;
use crate::sources::{base_source, data_sources, inputs, mixture_source};
use crate::{Event, LabError, ModelRef, Observer, RoundInput, RouterRun};

/// Outputs of router training.
#[derive(Clone, Debug)]
pub struct RouterOutput {
    /// The mixture with trained routers: `mixture/` for adapters, `model/` for a mixture of experts.
    pub mixture: PathBuf,
    /// Training report; `None` if training had already been completed.
    pub report: Option<TrainReport>,
    /// Content of `routing.json`; `None` if the file already existed.
    pub routing: Option<RoutingReport>,
}

/// Runs `cl moe train-router`. Writes to `out`: `config.toml`, the hashes of the inputs, `log.jsonl`, `rows.json`,
/// `mixture/` or `model/`, `routing.json`, `routing.svg` and `routing.png`. Everything in the mixture except its
/// routers is copied byte for byte. With `resume`, an unfinished run continues.
///
/// # Errors
/// Returns the problems that [`check_router`](crate::check_router) finds, before anything is written;
/// [`LabError::Output`] if `out` is not empty and `resume` is false, or belongs to another run; and an error if
/// training fails or a file cannot be read or written.
pub fn run_train_router(
    config: &RouterRun,
    out: &Path,
    resume: bool,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<RouterOutput, LabError> {
    let Checked { device, datasets, .. } = require_router(config)?;
    train_routers_on(config, &datasets.concat(), device, out, resume, interrupt, observer)
}

/// Like [`run_train_router`], with data that is already loaded.
pub(crate) fn train_routers_on(
    config: &RouterRun,
    data: &[Dataset],
    device: Device,
    out: &Path,
    resume: bool,
    interrupt: &Interrupt,
    observer: &mut Observer<'_>,
) -> Result<RouterOutput, LabError> {
    let settings = to_toml(&out.join("config.toml"), config)?;
    let base = ModelRef::take(&config.model)?;
    let beside = config.adapter.as_ref().map(|dir| Beside::open(dir, base.hash())).transpose()?;
    let train = config.round().train;
    let mut sources = vec![base_source(&base), data_sources(data.iter(), &train)?];
    sources.extend(beside.as_ref().map(|b| mixture_source(&b.hash, b.mixture.dir())));
    let mut inputs = inputs(&config.model, &train, data.iter().map(|d| d.path.as_path()));
    inputs.extend(config.adapter.iter().map(|dir| ("the mixture", dir.as_path())));
    let marker = "config.toml";
    let dir = RunDir { out, what: "run", marker, settings: &settings, sources: &sources, inputs: &inputs, resume };
    let _lock = dir.open()?;
    let input = RoundInput {
        model: &base,
        interrupt,
        finish: false,
        ranks: &Ranks::alone(),
        data,
        earlier_data: &[],
        mixture: &config.mixture(),
        config: &train,
        validation: None,
        seed: config.seed,
        buffer_seed: config.seed,
        profile: config.profile,
        device,
        compose: None,
        earlier: &[],
    };
    clean_up(out)?;
    let run = RouterRound { input: &input, beside: beside.as_ref() };
    let trained = out.join(if beside.is_some() { "mixture" } else { "model" });
    let report = if trained.join("manifest.json").exists() {
        verify(&trained)?;
        tell(observer, Event::Skipped("training"));
        None
    } else {
        Some(run.train(out, &trained, observer)?)
    };
    let routing = if out.join("routing.json").exists() {
        None
    } else {
        stop_if_asked(interrupt)?;
        tell(observer, Event::Stage("routing"));
        Some(run.write_routing(out, &trained)?)
    };
    for warning in routing.iter().flat_map(|r| &r.warnings) {
        tell(observer, Event::Warning(warning));
    }
    discard(&out.join("state"))?;
    Ok(RouterOutput { mixture: trained, report, routing })
}

/// The mixture of adapters that is trained, and its hash at the start of the run.
struct Beside {
    mixture: Mixture,
    hash: String,
}

impl Beside {
    fn open(dir: &Path, base: &str) -> Result<Beside, LabError> {
        let mixture = open_mixture(dir, base)?;
        Ok(Beside { hash: mixture_hash(&mixture)?, mixture })
    }

    fn check(&self) -> Result<(), LabError> {
        let dir = self.mixture.dir();
        let now = Mixture::open(dir).map_err(mixture_error(dir)).and_then(|mixture| mixture_hash(&mixture));
        if now.is_ok_and(|hash| hash == self.hash) { Ok(()) } else { Err(LabError::Changed { path: dir.to_owned() }) }
    }
}

struct RouterRound<'a> {
    input: &'a RoundInput<'a>,
    beside: Option<&'a Beside>,
}

impl RouterRound<'_> {
    fn train(&self, out: &Path, trained: &Path, observer: &mut Observer<'_>) -> Result<TrainReport, LabError> {
        let input = self.input;
        let (checkpoint, tokenizer) = open_model(input.model.dir())?;
        let encoded = encode(input, &tokenizer)?;
        let (rows, steps) = plan_rows(input, &encoded, out)?;
        let rows_of = |epoch: u64| rows.epoch(epoch);
        let span = tracing::info_span!("training").entered();
        tell(observer, Event::Stage("training"));
        let mut model = Decoder::load(&checkpoint, input.config.load_options(input.device))?;
        if let Some(beside) = self.beside {
            model.load_mixture(&beside.mixture)?;
        }
        model.train_routers();
        let data = TrainData { datasets: &encoded, epoch_rows: &rows_of, orthogonality: None, validation: None };
        let report = train(&mut model, &data, input.config, &steps, &input.context(out), None, &mut |p| {
            tell(observer, Event::Step(p))
        })?;
        drop(span);
        input.model.check()?;
        self.beside.map_or(Ok(()), Beside::check)?;
        tell(observer, Event::Stage("saving"));
        let routers = router_weights(&model);
        let saved = match self.beside {
            Some(beside) => save_mixture_with_routers(&beside.mixture, &routers, trained, self.manifest("mixture")),
            None => save_model_with_routers(&checkpoint, &routers, trained, self.manifest("model")),
        };
        saved.map_err(mixture_error(trained))?;
        Ok(report)
    }

    fn manifest(&self, kind: &str) -> Manifest {
        let input = self.input;
        let role = if self.beside.is_some() { "base" } else { "mixture" };
        let mut manifest = Manifest::new(kind).with_source(role, input.model.dir(), input.model.hash().to_owned());
        if let Some(beside) = self.beside {
            manifest = manifest.with_source("mixture", beside.mixture.dir(), beside.hash.clone());
        }
        for data in input.data {
            manifest = manifest.with_source("data", &data.path, data.hash.clone());
        }
        let (train, seed): (&TrainConfig, u64) = (input.config, input.seed);
        let mixture: &DataMixture = input.mixture;
        let settings = json!({"train": train, "mixture": mixture, "seed": seed, "profile": input.profile});
        manifest.with_config(json!({ "train_router": settings }))
    }

    /// Computes and writes statistics of the trained routers on the data.
    fn write_routing(&self, out: &Path, trained: &Path) -> Result<RoutingReport, LabError> {
        let input = self.input;
        let dir = if self.beside.is_some() { input.model.dir() } else { trained };
        let (checkpoint, tokenizer) = open_model(dir)?;
        let mut model = Decoder::load(&checkpoint, input.config.load_options(input.device))?;
        let mixture = match self.beside {
            Some(_) => Some(open_mixture(trained, input.model.hash())?),
            None => None,
        };
        if let Some(mixture) = &mixture {
            model.load_mixture(mixture)?;
        }
        let encoded = encode(input, &tokenizer)?;
        let tasks: Vec<(String, Vec<Encoded>)> = names(input).into_iter().zip(encoded).collect();
        let has = |router: &str, expert: usize| {
            let modules = mixture.as_ref().map(|m| &m.config().modules);
            modules.and_then(|m| m.get(router)).is_none_or(|module| module.ranks[expert] > 0)
        };
        let experts = expert_names(mixture.as_ref(), dir, &model);
        let report = routing_report(&mut model, &tasks, experts, &has, input.config.micro_batch_size)?;
        let text = serde_json::to_string_pretty(&report).expect("numbers and strings") + "\n";
        let picture = heat_map(&report)?;
        write_file(&out.join("routing.svg"), picture.svg.as_bytes())?;
        write_file(&out.join("routing.png"), &picture.png)?;
        // Written last: this file marks the report as complete.
        write_file(&out.join("routing.json"), text.as_bytes())?;
        Ok(report)
    }
}

/// Returns the values of the routers by tensor name.
fn router_weights(model: &Decoder) -> RouterWeights {
    let values = |t: Tensor| {
        let t = t.detach().to_device(Device::Cpu).to_kind(Kind::Float).flatten(0, -1);
        Vec::<f32>::try_from(t).expect("a vector of floats")
    };
    model.routers().into_iter().map(|(name, t)| (name, values(t))).collect()
}

/// Returns the names of a mixture's experts; for models, from the paths in the mixture's configuration.
fn expert_names(mixture: Option<&Mixture>, dir: &Path, model: &Decoder) -> Vec<String> {
    if let Some(mixture) = mixture {
        return mixture.config().experts.iter().map(|e| e.name.clone()).collect();
    }
    let count = model.config.experts.as_ref().map_or(0, |e| e.routed() as usize);
    let numbered = || (0..count).map(|e| e.to_string()).collect();
    let Ok(config) = MixConfig::read(&dir.join("moe_config.toml")) else { return numbered() };
    let names: Vec<String> = config.experts.iter().map(|e| expert_name(&e.model)).collect();
    if names.len() == count { names } else { numbered() }
}

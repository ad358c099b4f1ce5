//! Writes a mixture of LoRA adapters: the stacked factors of every module, and its router.

mod config;
mod plan;
mod prototype;

use std::path::Path;

use cl_checkpoint::problem::PlanProblem;
use cl_checkpoint::{Adapter, Checkpoint, HubSnapshot, Interrupt, Manifest, OutputDir, TensorSource, convert};
use rayon::prelude::*;
use safetensors::tensor::TensorView;
use serde_json::json;

pub use config::{BlendConfig, BlendExpert, BlendInit, BlendRouter};
pub use plan::BlendPlan;

use crate::mixture::{CONFIG, WEIGHTS};
use crate::model_info::INFO;
use crate::problem::MixtureProblem;
use crate::problem::VERSION;
use crate::router::normal;
use crate::{Error, MixtureConfig, MixtureExpert};
use plan::{BlendModule, BlendPart};
use prototype::Spectrum;

/// Writes the mixture as a directory: `mixture_config.json`, `mixture_model.safetensors`, `model_info.json` and a
/// manifest. The directory is written atomically. All factors are in memory once.
///
/// # Errors
/// Returns an error if a factor is not finite, if an input changes during the run, if the run is interrupted, or if a
/// file cannot be read or written. In these cases, no output is left.
pub fn blend(plan: &BlendPlan, out: &Path, overwrite: bool, interrupt: &Interrupt) -> Result<(), Error> {
    plan.check_output(out, overwrite)?;
    let dir = OutputDir::create(out, overwrite)?;
    let tensors: Vec<Vec<Vec<u8>>> = plan
        .modules
        .par_iter()
        .map(|module| if interrupt.requested() { Err(Error::Interrupted) } else { module_tensors(plan, module) })
        .collect::<Result<_, _>>()?;
    let specs = plan.tensors();
    let tensors = specs.iter().zip(tensors.iter().flatten());
    let views = tensors.map(|(spec, bytes)| {
        (&spec.name, TensorView::new(spec.dtype, spec.shape.clone(), bytes).expect("as many bytes as planned"))
    });
    let path = dir.path().join(WEIGHTS);
    safetensors::serialize_to_file(views, None, &path).map_err(|source| cl_checkpoint::Error::Plan {
        path: out.to_owned(),
        problem: Box::new(PlanProblem::Serialize { source }),
    })?;
    let (config, manifest) = describe(plan)?;
    for (name, content) in [(CONFIG, json!(config)), (INFO, json!(plan.info()))] {
        let text = serde_json::to_string_pretty(&content).expect("numbers and strings") + "\n";
        let path = dir.path().join(name);
        std::fs::write(&path, text).map_err(|source| cl_checkpoint::Error::Io { path, source })?;
    }
    plan.base.check_unchanged()?;
    plan.adapters.iter().try_for_each(Adapter::check_unchanged)?;
    Ok(dir.finish(manifest)?)
}

/// Creates the mixture's configuration and manifest.
fn describe(plan: &BlendPlan) -> Result<(MixtureConfig, Manifest), Error> {
    let resolved = resolved(&plan.config);
    let mut manifest = Manifest::new("mixture").with_config(json!({ "blend": resolved }));
    manifest = manifest.with_source("base", plan.base.dir(), plan.base_hash.clone());
    let mut experts = Vec::new();
    for (adapter, expert) in plan.adapters.iter().zip(&plan.config.experts) {
        let blake3 = adapter.content_hash()?;
        manifest = match &expert.model {
            Some(model) => manifest.with_source("tuned", model, Checkpoint::open(model)?.content_hash()?),
            None => manifest.with_source("adapter", adapter.dir(), blake3.clone()),
        };
        experts.push(MixtureExpert { name: expert.name(), adapter: HubSnapshot::source_name(expert.source()), blake3 });
    }
    for adapter in &plan.adapters[experts.len()..] {
        manifest = manifest.with_source("general", adapter.dir(), adapter.content_hash()?);
    }
    let config = MixtureConfig {
        format_version: VERSION,
        base_model_name_or_path: HubSnapshot::source_name(&plan.config.base_model),
        base_model_blake3: plan.base_hash.clone(),
        num_experts_per_tok: plan.config.top_k(),
        router_logits: plan.config.router.init.logits(),
        router_norm: plan.config.router.norm(),
        experts,
        modules: plan.modules.iter().map(|m| (m.name.clone(), m.experts())).collect(),
    };
    Ok((config, manifest))
}

/// The configuration with defaults filled in.
fn resolved(config: &BlendConfig) -> BlendConfig {
    let router = BlendRouter { norm: Some(config.router.norm()), ..config.router.clone() };
    BlendConfig { num_experts_per_tok: Some(config.top_k()), router, ..config.clone() }
}

/// Computes the bytes of a module's tensors, in the order of its specs.
fn module_tensors(plan: &BlendPlan, module: &BlendModule) -> Result<Vec<Vec<u8>>, Error> {
    let init = plan.config.router.init;
    let mut stack = Stack::new(module);
    for (expert, rank) in module.experts().ranks.into_iter().enumerate() {
        if rank == 0 {
            stack.router.extend(vec![0.0; module.input]);
            continue;
        }
        let [mut a, mut b] = sum(plan, module, expert, rank)?;
        if matches!(init, BlendInit::Arrow | BlendInit::Spectr) {
            let spectrum = Spectrum::of(&a, &b, rank).ok_or_else(|| Error::Mixture {
                path: plan.config.experts[expert].source().to_owned(),
                problem: MixtureProblem::Decomposition { module: module.name.clone() },
            })?;
            let temperature = plan.config.router.temperature.unwrap_or(1.0);
            let prototype = spectrum.prototype().unwrap_or_else(|| vec![0.0; module.input]);
            stack.router.extend(prototype.iter().map(|x| (f64::from(*x) / temperature) as f32));
            if init == BlendInit::Spectr {
                [a, b] = spectrum.factors(rank);
            }
        }
        stack.push(&a, &b, rank);
    }
    let experts = module.expert_count();
    let router = match init {
        BlendInit::Random => normal(plan.config.router.seed, module.name.as_bytes(), experts * module.input),
        BlendInit::Uniform => vec![0.0; experts * module.input],
        BlendInit::Arrow | BlendInit::Spectr => stack.router,
    };
    let values = [stack.a, stack.b, router];
    let specs = module.specs(&plan.config);
    Ok(specs.iter().zip(&values).map(|(s, v)| convert::from_f32(s.dtype, v).expect("a floating dtype")).collect())
}

/// Computes the factors A `(rank, in)` and B `(out, rank)` of an expert's update, without its scaling.
fn sum(plan: &BlendPlan, module: &BlendModule, expert: usize, rank: usize) -> Result<[Vec<f32>; 2], Error> {
    let mut a = Vec::with_capacity(rank * module.input);
    let mut b = vec![0.0; module.output * rank];
    let mut column = 0;
    for summand in module.summands(expert) {
        let [rows, columns] = read(&plan.adapters[summand.adapter], summand.part)?;
        let own = summand.part.module.rank();
        a.extend(rows);
        for (row, values) in b.chunks_exact_mut(rank).zip(columns.chunks_exact(own)) {
            for (sum, value) in row[column..column + own].iter_mut().zip(values) {
                *sum = (f64::from(*value) * summand.factor) as f32;
            }
        }
        column += own;
    }
    Ok([a, b])
}

/// Stacked factors of a module.
struct Stack {
    /// `(Σr, in)`: the experts' A, stacked by rows.
    a: Vec<f32>,
    /// `(out, Σr)`: the experts' B, stacked by columns.
    b: Vec<f32>,
    /// `(experts, in)`.
    router: Vec<f32>,
    total: usize,
    column: usize,
}

impl Stack {
    fn new(module: &BlendModule) -> Stack {
        let total = module.experts().total_rank();
        let b = vec![0.0; module.output * total];
        Stack { a: Vec::with_capacity(total * module.input), b, router: Vec::new(), total, column: 0 }
    }

    fn push(&mut self, a: &[f32], b: &[f32], rank: usize) {
        self.a.extend_from_slice(a);
        for (row, own) in self.b.chunks_exact_mut(self.total).zip(b.chunks_exact(rank)) {
            row[self.column..self.column + rank].copy_from_slice(own);
        }
        self.column += rank;
    }
}

/// Reads A and B of an expert and checks that they are finite.
fn read(adapter: &Adapter, part: &BlendPart) -> Result<[Vec<f32>; 2], Error> {
    let [a, b] = part.module.factors();
    let load = |name: String| {
        let dtype = adapter.info(&name).expect("planned from this adapter").dtype;
        let values = convert::to_f32(dtype, adapter.bytes(&name)?).expect("checked to be floating");
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(index) => {
                let model = adapter.dir().display().to_string();
                Err(Error::NotFinite { model, tensor: name, index, value: values[index] })
            }
        }
    };
    Ok([load(a)?, load(b)?])
}

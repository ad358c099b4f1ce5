//! Router statistics of a mixture on data: entropy, load and gates of each router, by task.

use std::collections::BTreeMap;

use cl_adapters::{Mode, RouterRecord, top_k};
use cl_data::{Encoded, pack};
use cl_model::{Decoder, PackedBatch};
use cl_torch::tch::{self, Kind, Tensor};
use serde::Serialize;

use crate::LabError;

/// Number of rows per task from which statistics are computed; the first rows are used.
const ROWS: usize = 256;
/// An expert whose load is below this fraction of an equal share is considered dead.
const DEAD: f64 = 0.01;
/// Condition number of a router matrix above which its rows are considered nearly linearly dependent.
const CONDITION: f64 = 100.0;

/// Content of `routing.json`.
#[derive(Clone, Debug, Serialize)]
pub struct RoutingReport {
    /// Names of the experts, in the order used by all lists.
    pub experts: Vec<String>,
    /// Number of experts per token.
    pub num_experts_per_tok: i64,
    /// Statistics by task, as means over all routers.
    pub tasks: Vec<TaskRouting>,
    /// Statistics of each router, in model order.
    pub routers: Vec<RouterReport>,
    /// Warnings about degenerate experts and routers.
    pub warnings: Vec<String>,
}

/// Statistics over the tokens of a task, as means over all routers.
#[derive(Clone, Debug, Serialize)]
pub struct TaskRouting {
    /// Name of the data set.
    pub task: String,
    /// Number of its rows that were used.
    pub rows: usize,
    /// The statistics.
    #[serde(flatten)]
    pub routing: Routing,
}

/// Statistics of one router.
#[derive(Clone, Debug, Serialize)]
pub struct RouterReport {
    /// Name of the module that it belongs to.
    pub router: String,
    /// Index of its layer.
    pub layer: Option<usize>,
    /// Condition number of its weight (largest over smallest singular value), without the rows of experts that have no
    /// parameters in this module; `None` if it is infinite or the router has no weight.
    pub condition_number: Option<f64>,
    /// Statistics over the tokens of all tasks.
    #[serde(flatten)]
    pub routing: Routing,
    /// Statistics by task.
    pub by_task: BTreeMap<String, Routing>,
}

/// Router statistics, as means over tokens.
#[derive(Clone, Debug, Serialize)]
pub struct Routing {
    /// Number of tokens.
    pub tokens: u64,
    /// Entropy of the softmax over all logits, divided by its maximum: 0 to 1.
    pub entropy: f64,
    /// Fraction of the tokens that select each expert; sums to k.
    pub load: Vec<f64>,
    /// Mean share of each expert in a token's gates; sums to 1.
    pub gate_share: Vec<f64>,
}

/// Sums over tokens.
#[derive(Clone, Default)]
struct Sums {
    tokens: u64,
    entropy: f64,
    selections: Vec<f64>,
    shares: Vec<f64>,
}

/// Tells whether an expert has parameters in a router's module.
pub(crate) type HasExpert<'a> = dyn Fn(&str, usize) -> bool + 'a;

/// Runs the first rows of each task through the model and collects statistics of its routers.
///
/// # Errors
/// Returns the errors of the forward pass.
pub(crate) fn routing_report(
    model: &mut Decoder,
    tasks: &[(String, Vec<Encoded>)],
    experts: Vec<String>,
    has: &HasExpert<'_>,
    micro_batch_size: usize,
) -> Result<RoutingReport, LabError> {
    let _no_graph = tch::no_grad_guard();
    let log = model.record_routers();
    let mut order: Vec<String> = Vec::new();
    let mut sums: BTreeMap<String, Vec<Sums>> = BTreeMap::new(); // of each task, by router
    let mut chosen = 0;
    for (task, (_, rows)) in tasks.iter().enumerate() {
        for rows in rows[..rows.len().min(ROWS)].chunks(micro_batch_size) {
            let packed = pack(&rows.iter().collect::<Vec<_>>());
            let batch = PackedBatch::from_packed(&packed, model.config.vocab_size, model.device)?;
            let _ = model.forward(&batch, Mode::Eval)?;
            for record in log.take() {
                chosen = record.top_k;
                if !order.contains(&record.router) {
                    order.push(record.router.clone());
                }
                let of_router = sums.entry(record.router.clone());
                of_router.or_insert_with(|| vec![Sums::default(); tasks.len()])[task].add(&record);
            }
        }
    }
    let weights: BTreeMap<String, Tensor> = model.routers().into_iter().collect();
    let report = |router: &String| {
        let of_tasks = &sums[router];
        let names = tasks.iter().map(|(name, _)| name.clone());
        let weight = [format!("{router}.weight"), cl_moe::mixture_tensors(router)[2].clone()];
        let weight = weight.iter().find_map(|name| weights.get(name));
        RouterReport {
            router: router.clone(),
            layer: router.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok()),
            condition_number: weight.map(|w| condition_number(w, router, has)).filter(|c| c.is_finite()),
            routing: Sums::total(of_tasks.iter()).means(),
            by_task: names.zip(of_tasks.iter().map(Sums::means)).collect(),
        }
    };
    let routers: Vec<RouterReport> = order.iter().map(report).collect();
    let task = |(index, (name, rows)): (usize, &(String, Vec<Encoded>))| {
        let routing = Sums::total(sums.values().map(|of_tasks| &of_tasks[index])).means();
        TaskRouting { task: name.clone(), rows: rows.len().min(ROWS), routing }
    };
    let has_weights = !weights.is_empty();
    let tasks = tasks.iter().enumerate().map(task).collect();
    let mut report = RoutingReport { experts, num_experts_per_tok: chosen, tasks, routers, warnings: Vec::new() };
    report.warnings = warnings(&report, has, has_weights);
    Ok(report)
}

impl Sums {
    fn add(&mut self, record: &RouterRecord) {
        let experts = record.logits.size()[1];
        let log_p = record.logits.log_softmax(-1, Kind::Float);
        self.tokens += record.logits.size()[0] as u64;
        self.entropy -= (log_p.exp() * &log_p).sum(Kind::Double).double_value(&[]);
        let selections = top_k(&record.logits, record.top_k).one_hot(experts);
        let selections = selections.sum_dim_intlist([0, 1].as_slice(), false, Kind::Double);
        let gates = record.gates.abs();
        let shares = &gates / gates.sum_dim_intlist(-1, true, Kind::Float).clamp_min(f64::from(f32::MIN_POSITIVE));
        let shares = shares.sum_dim_intlist(0, false, Kind::Double);
        add_to(&mut self.selections, &values(&selections));
        add_to(&mut self.shares, &values(&shares));
    }

    fn total<'a>(all: impl Iterator<Item = &'a Sums>) -> Sums {
        let mut total = Sums::default();
        all.for_each(|sums| total.merge(sums));
        total
    }

    fn merge(&mut self, other: &Sums) {
        self.tokens += other.tokens;
        self.entropy += other.entropy;
        add_to(&mut self.selections, &other.selections);
        add_to(&mut self.shares, &other.shares);
    }

    fn means(&self) -> Routing {
        let tokens = self.tokens.max(1) as f64;
        let mean = |sums: &[f64]| sums.iter().map(|s| s / tokens).collect();
        // With one expert the maximum entropy would be ln 1 = 0.
        let most = (self.shares.len().max(2) as f64).ln();
        Routing {
            tokens: self.tokens,
            entropy: self.entropy / tokens / most,
            load: mean(&self.selections),
            gate_share: mean(&self.shares),
        }
    }
}

fn add_to(sums: &mut Vec<f64>, values: &[f64]) {
    sums.resize(values.len().max(sums.len()), 0.0);
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

fn values(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double)).expect("a vector of numbers")
}

/// Computes the condition number of the rows of experts that have parameters in the module.
fn condition_number(weight: &Tensor, router: &str, has: &HasExpert<'_>) -> f64 {
    let rows: Vec<Tensor> = (0..weight.size()[0]).filter(|&e| has(router, e as usize)).map(|e| weight.get(e)).collect();
    if rows.is_empty() {
        return 1.0;
    }
    let (_, singular, _) = Tensor::stack(&rows, 0).to_kind(Kind::Double).svd(true, false);
    let singular = values(&singular);
    let least = singular.last().copied().unwrap_or(0.0);
    if least > 0.0 { singular[0] / least } else { f64::INFINITY }
}

/// Returns one warning per expert that is hardly used, and per router that can hardly distinguish experts.
fn warnings(report: &RoutingReport, has: &HasExpert<'_>, has_weights: bool) -> Vec<String> {
    let mut warnings = Vec::new();
    let (count, chosen) = (report.experts.len(), report.num_experts_per_tok as usize);
    for (e, name) in report.experts.iter().enumerate() {
        let is_dead = |r: &&RouterReport| {
            let share = if chosen < count { r.routing.load[e] / chosen as f64 } else { r.routing.gate_share[e] };
            has(&r.router, e) && share < DEAD / count as f64
        };
        let dead: Vec<&RouterReport> = report.routers.iter().filter(is_dead).collect();
        if let Some(first) = dead.first() {
            warnings.push(format!(
                "expert `{name}` is dead in {} of {} routers ({} first): it gets less than a hundredth of an equal share",
                dead.len(),
                report.routers.len(),
                first.router
            ));
        }
    }
    let dependent = |r: &&RouterReport| has_weights && r.condition_number.is_none_or(|c| c > CONDITION);
    let dependent: Vec<&RouterReport> = report.routers.iter().filter(dependent).collect();
    if let Some(first) = dependent.first() {
        let number = first.condition_number.map_or("infinite".to_owned(), |c| format!("{c:.0}"));
        warnings.push(format!(
            "the rows of {} of {} routers are nearly dependent ({} first, condition number {number}): some experts cannot be \
             told apart",
            dependent.len(),
            report.routers.len(),
            first.router
        ));
    }
    warnings
}

//! All methods in one table, and what makes a method of a name and its parameters.

use std::ops::RangeInclusive;

use crate::config::{DivisorChoice, Election, Profile, ProjectionChoice, RescaleChoice, Trimmed};
use crate::methods::{self, Consensus, Divisor, Rescale, Sign, Sparsify, TaskVectors};
use crate::{MergeMethod, Parameter, Parameters};

/// Whether a method has a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// It needs one.
    Required,
    /// It is about task vectors with one and about models without.
    Optional,
    /// A base is one more input.
    Input,
}

/// One method.
#[derive(Clone, Debug)]
pub struct MethodInfo {
    /// Name in files.
    pub name: &'static str,
    /// Name in texts.
    pub title: &'static str,
    /// Where it comes from.
    pub paper: &'static str,
    /// What it computes.
    pub formula: &'static str,
    /// Whether it has a base.
    pub base: Base,
    /// How many models it takes, the base not counted.
    pub models: RangeInclusive<usize>,
    /// Names of its parameters.
    pub parameters: &'static [&'static str],
    /// Whether the order of models means something. Where it does not, models are taken in the order of their names, so that
    /// the order in a file does not change a bit.
    pub ordered: bool,
}

/// One parameter.
#[derive(Clone, Debug)]
pub struct ParameterInfo {
    /// Name in files.
    pub name: &'static str,
    /// What it does.
    pub meaning: &'static str,
    /// Values it can have.
    pub range: &'static str,
    /// Lowest and highest number.
    pub bounds: (f64, f64),
    /// Whether each model can have its own.
    pub per_model: bool,
}

const ANY: RangeInclusive<usize> = 1..=usize::MAX;
const INFINITE: (f64, f64) = (f64::MIN, f64::MAX);
const SHARE: (f64, f64) = (0.0, 1.0);

/// Every parameter.
pub const PARAMETERS: &[ParameterInfo] = &[
    number("weight", "how much of the model", "any number", INFINITE, true),
    number("density", "share of a task vector's entries that is kept", "0 to 1", SHARE, true),
    number("gamma", "share of a task vector's largest entries that is cut off", "0 to 1", SHARE, true),
    number(
        "epsilon",
        "half of the span of probabilities around density",
        "0 to 1, density ± epsilon within 0 to 1",
        SHARE,
        true,
    ),
    number("lambda", "scale of the merged task vector", "any number", INFINITE, false),
    number(
        "t",
        "place between base (0) and model (1); nearswap: how near a weight has to be",
        "any number",
        INFINITE,
        false,
    ),
    number("scale", "factor of the tensor", "any number", INFINITE, true),
    number("select_topk", "share of entries, those that vary most between models", "0 to 1", SHARE, false),
    number(
        "mask_threshold",
        "an entry is a task's own when it is at least so many times what the others add",
        "at least 0",
        (0.0, f64::MAX),
        true,
    ),
    number(
        "alpha",
        "share of the sum of singular values that counts as the earlier tasks' own space",
        "0 to 1",
        SHARE,
        false,
    ),
    number("rank_share", "share of a matrix' rank that each task keeps", "0 to 1; default 1 / models", SHARE, false),
    number("common_share", "share of directions that the sum of task vectors keeps", "0 to 1", SHARE, false),
    number("min_agree", "tasks whose masks have to agree on an entry", "1 or more", (1.0, f64::MAX), false),
    number("max_iter", "rounds of the iteration at most", "0 or more", (0.0, f64::MAX), false),
    number("tol", "where the iteration stops", "above 0", (0.0, f64::MAX), false),
    number("eps", "guard against division by zero", "above 0", (0.0, f64::MAX), false),
    choice("normalize", "divide by the weights of those that take part", "true or false"),
    choice("normalize_weights", "make weights sum to one", "true or false"),
    choice("filter_wise", "one ratio for each row instead of each tensor", "true or false"),
    choice("nuslerp_row_wise", "by columns instead of rows, where not flattened", "true or false"),
    choice("nuslerp_flatten", "tensors as one vector", "true or false"),
    choice("int8_mask", "no effect, masks are never stored", "true or false"),
    choice(
        "rescale",
        "what makes up for dropped entries",
        "none, density (1 / density), norm (the L1 norm of the whole)",
    ),
    choice("trim", "what is trimmed by itself", "tensor, model"),
    choice("election", "what elects an entry's sign", "unweighted, weighted (sums), count (of signs)"),
    choice("divisor", "what the sum is divided by", "none, weight, count (of those that take part)"),
    choice("only", "instead of the consensus, what this model's own mask keeps", "a model as written"),
    choice("scaled", "trim Σ Vᵀ instead of Vᵀ", "true or false"),
    choice(
        "projection",
        "what is removed: leading (from leading to leading directions), complement (what touches them)",
        "leading, complement",
    ),
    choice("norms", "what has one scale", "model, tensor"),
    choice("previous", "directory of an earlier merge that this one goes on from", "a path"),
];

const fn number(
    name: &'static str,
    meaning: &'static str,
    range: &'static str,
    bounds: (f64, f64),
    per_model: bool,
) -> ParameterInfo {
    ParameterInfo { name, meaning, range, bounds, per_model }
}

const fn choice(name: &'static str, meaning: &'static str, range: &'static str) -> ParameterInfo {
    ParameterInfo { name, meaning, range, bounds: INFINITE, per_model: false }
}

const fn row(
    name: &'static str,
    title: &'static str,
    paper: &'static str,
    formula: &'static str,
    base: Base,
    models: RangeInclusive<usize>,
    parameters: &'static [&'static str],
) -> MethodInfo {
    MethodInfo { name, title, paper, formula, base, models, parameters, ordered: false }
}

const fn ordered(mut info: MethodInfo) -> MethodInfo {
    info.ordered = true;
    info
}

/// Every method.
pub const METHODS: &[MethodInfo] = &[
    row(
        "linear",
        "Linear",
        "Wortsman et al., arXiv 2203.05482",
        "Σ wᵢθᵢ / Σ wᵢ",
        Base::Input,
        ANY,
        &["weight", "normalize"],
    ),
    ordered(row(
        "slerp",
        "SLERP",
        "Shoemake 1985",
        "(sin((1−t)φ) θ₀ + sin(tφ) θ₁) / sin φ, φ the angle between θ₀ and θ₁",
        Base::Required,
        1..=1,
        &["t"],
    )),
    ordered(row(
        "nuslerp",
        "NuSLERP",
        "mergekit",
        "SLERP of two models, or of their task vectors, at w₂ / (w₁ + w₂)",
        Base::Optional,
        2..=2,
        &["weight", "nuslerp_row_wise", "nuslerp_flatten"],
    )),
    row(
        "multislerp",
        "Multi-SLERP",
        "Goddard 2024, goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        "weighted mean on the sphere by one step in the tangent space",
        Base::Optional,
        ANY,
        &["weight", "normalize_weights", "eps"],
    ),
    row(
        "karcher",
        "Karcher mean",
        "Karcher 1977; arXiv 2603.04972",
        "mean on the sphere, iterated, times the mean norm",
        Base::Input,
        ANY,
        &["max_iter", "tol"],
    ),
    row(
        "task_arithmetic",
        "Task arithmetic",
        "Ilharco et al., arXiv 2212.04089",
        "θ₀ + λ Σ wᵢδᵢ",
        Base::Required,
        ANY,
        &["weight", "lambda", "normalize", "divisor", "int8_mask"],
    ),
    row(
        "ties",
        "TIES",
        "Yadav et al., arXiv 2306.01708",
        "θ₀ + λ · disjoint mean of the trimmed δᵢ with the elected sign",
        Base::Required,
        ANY,
        &["weight", "density", "lambda", "normalize", "rescale", "trim", "election", "divisor", "int8_mask"],
    ),
    row(
        "dare_linear",
        "DARE",
        "Yu et al., arXiv 2311.03099",
        "θ₀ + λ Σ wᵢ · mask(δᵢ) / density",
        Base::Required,
        ANY,
        &["weight", "density", "lambda", "normalize", "rescale", "divisor", "int8_mask"],
    ),
    row(
        "dare_ties",
        "DARE-TIES",
        "Yu et al., arXiv 2311.03099",
        "as dare_linear, with TIES' election",
        Base::Required,
        ANY,
        &["weight", "density", "lambda", "normalize", "rescale", "election", "divisor", "int8_mask"],
    ),
    row(
        "della",
        "DELLA",
        "Deep et al., arXiv 2406.11617",
        "as dare_ties, kept with a probability by the rank of the magnitude in its row",
        Base::Required,
        ANY,
        &["weight", "density", "epsilon", "lambda", "normalize", "rescale", "election", "divisor", "int8_mask"],
    ),
    row(
        "della_linear",
        "DELLA, linear",
        "Deep et al., arXiv 2406.11617",
        "as della, without an election",
        Base::Required,
        ANY,
        &["weight", "density", "epsilon", "lambda", "normalize", "rescale", "divisor", "int8_mask"],
    ),
    row(
        "breadcrumbs",
        "Model Breadcrumbs",
        "Davari and Belilovsky, arXiv 2312.06795",
        "θ₀ + λ Σ wᵢ · (δᵢ without its largest and smallest entries)",
        Base::Required,
        ANY,
        &["weight", "density", "gamma", "lambda", "normalize", "rescale", "divisor", "int8_mask"],
    ),
    row(
        "breadcrumbs_ties",
        "Model Breadcrumbs with TIES",
        "Davari and Belilovsky, arXiv 2312.06795",
        "as breadcrumbs, with TIES' election",
        Base::Required,
        ANY,
        &["weight", "density", "gamma", "lambda", "normalize", "rescale", "election", "divisor", "int8_mask"],
    ),
    row(
        "sce",
        "SCE",
        "Wan et al., arXiv 2408.07990",
        "select entries by variance, weigh models by energy, erase minority signs",
        Base::Required,
        ANY,
        &["select_topk", "int8_mask"],
    ),
    row(
        "model_stock",
        "Model Stock",
        "Jang et al., arXiv 2403.19522",
        "t · mean + (1−t) θ₀, t = N cos φ / (1 + (N−1) cos φ)",
        Base::Required,
        2..=usize::MAX,
        &["filter_wise"],
    ),
    ordered(row(
        "nearswap",
        "NearSwap",
        "alchemonaut 2024, QuartetAnemoi-70B-t0.0001",
        "θ₀ + min(1, t / |θ₁−θ₀|) (θ₁−θ₀)",
        Base::Required,
        1..=1,
        &["t"],
    )),
    ordered(row(
        "arcee_fusion",
        "Arcee Fusion",
        "mergekit",
        "θ₀ + δ where |δ| · KL(softmax θ₁ ‖ softmax θ₀) is above median + 1.5 (q₃ − q₁)",
        Base::Required,
        1..=1,
        &[],
    )),
    ordered(row("passthrough", "Passthrough", "mergekit", "scale · θ", Base::Input, 1..=1, &["scale"])),
    row(
        "tsv",
        "Task Singular Vectors (TSV-Merge)",
        "Gargiulo et al., arXiv 2412.00081",
        "θ₀ + λ U⊥ Σ V⊥ᵀ of the tasks' leading singular vectors, decorrelated",
        Base::Required,
        ANY,
        &["lambda", "rank_share"],
    ),
    row(
        "iso_c",
        "Iso-C",
        "Marczak et al., arXiv 2502.04959",
        "θ₀ + λ · mean(σ) U Vᵀ, U Σ Vᵀ = Σ δᵢ",
        Base::Required,
        ANY,
        &["lambda"],
    ),
    row(
        "iso_cts",
        "Iso-CTS",
        "Marczak et al., arXiv 2502.04959",
        "as iso_c, with the tasks' own directions in place of the least common ones",
        Base::Required,
        ANY,
        &["lambda", "common_share"],
    ),
    row(
        "knots",
        "KnOTS-TIES",
        "Stoica et al., arXiv 2410.19735",
        "θ₀ + λ U Σ (TIES of Vᵢ)ᵀ, U Σ [V₁ … Vₙ]ᵀ = [δ₁ … δₙ]",
        Base::Required,
        ANY,
        &["weight", "density", "lambda", "scaled", "election", "divisor"],
    ),
    row(
        "consensus",
        "Consensus (TALL-mask)",
        "Wang et al., arXiv 2405.07813",
        "θ₀ + λ Σ δᵢ where at least min_agree tasks have |δᵢ| ≥ threshold · |Σ δ − δᵢ|",
        Base::Required,
        ANY,
        &["lambda", "mask_threshold", "min_agree", "only"],
    ),
    row(
        "magmax",
        "MagMax",
        "Marczak et al., arXiv 2407.06322",
        "θ₀ + λ · the δᵢ of greatest magnitude, entry by entry",
        Base::Required,
        ANY,
        &["lambda"],
    ),
    ordered(row(
        "opcm",
        "OPCM",
        "Tang et al., arXiv 2501.09522",
        "one model after another, each δ projected off those before it, at a constant norm",
        Base::Required,
        ANY,
        &["alpha", "projection", "norms", "previous"],
    )),
];

/// A method by its name.
pub fn method(name: &str) -> Option<&'static MethodInfo> {
    METHODS.iter().find(|info| info.name == name)
}

/// A parameter by its name.
pub fn parameter(name: &str) -> Option<&'static ParameterInfo> {
    PARAMETERS.iter().find(|info| info.name == name)
}

/// The settings that hold for one tensor.
pub(crate) struct Settings<'a> {
    /// Of the method, or of the slice before it: the first that has a value wins.
    pub(crate) shared: Vec<&'a Parameters>,
    /// Of each model, and the name of the tensor in it; then `shared`.
    pub(crate) models: Vec<(&'a Parameters, &'a str)>,
    pub(crate) tensor: &'a str,
    pub(crate) t: f64,
    /// What keys each model's masks.
    pub(crate) keys: Vec<&'a str>,
    /// Where an earlier merge ended that this one goes on from.
    pub(crate) previous: Option<&'a methods::OpcmState>,
    pub(crate) seed: u64,
}

type Field = fn(&Parameters) -> &Option<Parameter>;

impl Settings<'_> {
    fn number(&self, field: Field) -> Option<f64> {
        self.shared.iter().find_map(|p| field(p).as_ref()?.resolve(self.tensor, self.t))
    }

    fn of_input(&self, (own, tensor): (&Parameters, &str), field: Field) -> Option<f64> {
        let of = |p: &Parameters| field(p).as_ref().and_then(|value| value.resolve(tensor, self.t));
        of(own).or_else(|| self.shared.iter().find_map(|p| of(p)))
    }

    fn per_model(&self, field: Field, default: f64) -> Vec<f64> {
        self.models.iter().map(|&model| self.of_input(model, field).unwrap_or(default)).collect()
    }

    fn choice<T: Copy>(&self, field: fn(&Parameters) -> &Option<T>) -> Option<T> {
        self.shared.iter().find_map(|p| *field(p))
    }

    fn weights(&self) -> Vec<f32> {
        self.per_model(|p| &p.weight, 1.0).into_iter().map(|w| w as f32).collect()
    }

    fn lambda(&self) -> f32 {
        self.number(|p| &p.lambda).unwrap_or(1.0) as f32
    }
}

/// The parameters of a method with every default filled in, by whose definitions hold.
pub(crate) fn resolve(name: &str, profile: Profile, given: &Parameters) -> Parameters {
    let mut p = given.clone();
    let Some(info) = method(name) else { return p };
    let has = |parameter: &str| info.parameters.contains(&parameter);
    let mergekit = profile == Profile::Mergekit;
    let number = |field: &mut Option<Parameter>, parameter: &str, value: f64| {
        if has(parameter) {
            field.get_or_insert(Parameter::Number(value));
        }
    };
    number(&mut p.weight, "weight", 1.0);
    number(&mut p.density, "density", 1.0);
    number(&mut p.gamma, "gamma", 0.01);
    number(&mut p.epsilon, "epsilon", 0.15);
    number(&mut p.lambda, "lambda", 1.0);
    number(&mut p.select_topk, "select_topk", 1.0);
    number(&mut p.mask_threshold, "mask_threshold", 0.4);
    number(&mut p.alpha, "alpha", 0.5);
    number(&mut p.common_share, "common_share", 0.8);
    if has("scaled") {
        p.scaled.get_or_insert(false);
    }
    if has("projection") {
        p.projection.get_or_insert(ProjectionChoice::Leading);
        p.norms.get_or_insert(Trimmed::Model);
    }
    if has("min_agree") {
        p.min_agree.get_or_insert(2);
    }
    if has("max_iter") {
        p.max_iter.get_or_insert(10);
        p.tol.get_or_insert(1e-5);
    }
    if has("normalize_weights") {
        p.normalize_weights.get_or_insert(true);
        p.eps.get_or_insert(1e-8);
    }
    if has("filter_wise") {
        p.filter_wise.get_or_insert(false);
    }
    if has("nuslerp_flatten") {
        p.nuslerp_flatten.get_or_insert(true);
        p.nuslerp_row_wise.get_or_insert(false);
    }
    if has("divisor") {
        // `normalize` is mergekit's word for the two of these that it has.
        let of_normalize = p.normalize.take().map(divisor_of);
        p.divisor = p.divisor.or(of_normalize).or(Some(match (has("election"), mergekit) {
            (true, true) if matches!(name, "ties" | "della") => DivisorChoice::Weight,
            (true, true) if name != "knots" => DivisorChoice::None,
            (true, _) => DivisorChoice::Count,
            _ => DivisorChoice::None,
        }));
    } else if has("normalize") {
        p.normalize.get_or_insert(true);
    }
    if has("election") {
        p.election.get_or_insert(if mergekit && name != "knots" { Election::Weighted } else { Election::Unweighted });
    }
    if has("rescale") {
        let random = matches!(name, "dare_linear" | "dare_ties" | "della" | "della_linear");
        p.rescale.get_or_insert(match profile {
            Profile::Method if random => RescaleChoice::Density,
            Profile::Mergekit if random => RescaleChoice::Norm,
            _ => RescaleChoice::None,
        });
    }
    if has("trim") {
        p.trim.get_or_insert(if profile == Profile::Method { Trimmed::Model } else { Trimmed::Tensor });
    }
    p
}

fn divisor_of(normalize: bool) -> DivisorChoice {
    if normalize { DivisorChoice::Weight } else { DivisorChoice::None }
}

/// The method for one tensor; `shared` of the settings ends with resolved parameters.
///
/// # Errors
/// What is missing or out of range.
pub(crate) fn build(name: &str, s: &Settings<'_>) -> Result<Box<dyn MergeMethod>, String> {
    Ok(match name {
        "linear" => {
            let (weights, normalize) = (s.weights(), s.choice(|p| &p.normalize).unwrap_or(true));
            if normalize && weights.iter().sum::<f32>() == 0.0 {
                return Err("the weights sum to zero; set normalize = false or other weights".to_owned());
            }
            Box::new(methods::Linear { weights, normalize })
        }
        "slerp" => Box::new(methods::Slerp {
            t: s.number(|p| &p.t).ok_or("slerp needs `t`, 0 for the base to 1 for the model")?,
        }),
        "nuslerp" => Box::new(methods::NuSlerp {
            weights: s.per_model(|p| &p.weight, 1.0).try_into().map_err(|_| "nuslerp merges two models".to_owned())?,
            row_wise: s.choice(|p| &p.nuslerp_row_wise).unwrap_or(false),
            flatten: s.choice(|p| &p.nuslerp_flatten).unwrap_or(true),
        }),
        "multislerp" => Box::new(methods::MultiSlerp {
            weights: s.per_model(|p| &p.weight, 1.0),
            normalize_weights: s.choice(|p| &p.normalize_weights).unwrap_or(true),
            eps: s.choice(|p| &p.eps).unwrap_or(1e-8),
        }),
        "karcher" => Box::new(methods::Karcher {
            max_iter: s.choice(|p| &p.max_iter).unwrap_or(10),
            tol: s.choice(|p| &p.tol).unwrap_or(1e-5),
        }),
        "model_stock" => Box::new(methods::ModelStock { filter_wise: s.choice(|p| &p.filter_wise).unwrap_or(false) }),
        "nearswap" => Box::new(methods::Nearswap { t: s.number(|p| &p.t).ok_or("nearswap needs `t`, such as 0.001")? }),
        "arcee_fusion" => Box::new(methods::ArceeFusion),
        "passthrough" => Box::new(methods::Passthrough {
            scale: s.models.first().and_then(|&model| s.of_input(model, |p| &p.scale)),
        }),
        "sce" => Box::new(methods::Sce { select_topk: s.number(|p| &p.select_topk).unwrap_or(1.0) }),
        "magmax" => Box::new(methods::MagMax { lambda: f64::from(s.lambda()) }),
        "consensus" => {
            let only = s.shared.iter().find_map(|p| p.only.as_deref());
            let position = |name: &str| {
                let missing =
                    || format!("`only` is `{name}`, which is none of the models; give a path or name as written");
                s.keys.iter().position(|key| *key == name).ok_or_else(missing)
            };
            Box::new(methods::ConsensusMerging {
                lambda: f64::from(s.lambda()),
                tall_lambda: s.per_model(|p| &p.mask_threshold, 0.4),
                min_agree: s.choice(|p| &p.min_agree).unwrap_or(2),
                only: only.map(position).transpose()?,
            })
        }
        "tsv" => Box::new(methods::Tsv { lambda: f64::from(s.lambda()), rank_share: s.number(|p| &p.rank_share) }),
        "iso_c" => Box::new(methods::IsoC { lambda: f64::from(s.lambda()) }),
        "iso_cts" => Box::new(methods::IsoCts {
            lambda: f64::from(s.lambda()),
            common_share: s.number(|p| &p.common_share).unwrap_or(0.8),
        }),
        "knots" => Box::new(methods::Knots {
            merge: task_vectors("ties", s)?,
            scaled: s.choice(|p| &p.scaled).unwrap_or(false),
        }),
        "opcm" => Box::new(methods::Opcm {
            alpha: s.number(|p| &p.alpha).unwrap_or(0.5),
            projection: match s.choice(|p| &p.projection) {
                Some(ProjectionChoice::Complement) => methods::Projection::Complement,
                Some(ProjectionChoice::Leading) | None => methods::Projection::Leading,
            },
            previous: s.previous.cloned(),
            over_model: s.choice(|p| &p.norms) != Some(Trimmed::Tensor),
            norms: None,
        }),
        name => Box::new(task_vectors(name, s)?),
    })
}

/// Whether a tensor that is passed through stays as it is.
pub(crate) fn untouched(s: &Settings<'_>) -> bool {
    s.models.iter().all(|&model| s.of_input(model, |p| &p.scale).is_none_or(|scale| scale == 1.0))
}

/// A row of the family of task vectors.
fn task_vectors(name: &str, s: &Settings<'_>) -> Result<TaskVectors, String> {
    let density = s.per_model(|p| &p.density, 1.0);
    let sparsify = match name {
        "task_arithmetic" => Sparsify::None,
        "ties" => Sparsify::Magnitude { density },
        "dare_linear" | "dare_ties" => Sparsify::Random { density },
        "breadcrumbs" | "breadcrumbs_ties" => Sparsify::Outliers { density, gamma: s.per_model(|p| &p.gamma, 0.01) },
        "della" | "della_linear" => {
            let epsilon = s.per_model(|p| &p.epsilon, 0.15);
            for (d, e) in density.iter().zip(&epsilon) {
                if *d > 0.0 && *d < 1.0 && !(d - e > 0.0 && d + e < 1.0) {
                    return Err(format!(
                        "density {d} ± epsilon {e} has to lie between 0 and 1; choose a smaller epsilon"
                    ));
                }
            }
            Sparsify::Ranked { density, epsilon }
        }
        other => return Err(format!("no method is called `{other}`")),
    };
    let rescale = match s.choice(|p| &p.rescale) {
        Some(RescaleChoice::Density) => Rescale::Density,
        Some(RescaleChoice::Norm) => Rescale::Norm,
        Some(RescaleChoice::None) | None => Rescale::None,
    };
    let consensus = s.choice(|p| &p.election).map(|election| match election {
        Election::Unweighted => Consensus { sign: Sign::Sum, weighted: false },
        Election::Weighted => Consensus { sign: Sign::Sum, weighted: true },
        Election::Count => Consensus { sign: Sign::Count, weighted: false },
    });
    let divisor = s.shared.iter().find_map(|p| p.divisor.or(p.normalize.map(divisor_of)));
    let divisor = match divisor {
        Some(DivisorChoice::Weight) => Divisor::Weight,
        Some(DivisorChoice::Count) => Divisor::Count,
        Some(DivisorChoice::None) | None => Divisor::None,
    };
    Ok(TaskVectors { weights: s.weights(), lambda: s.lambda(), sparsify, rescale, consensus, divisor, seed: s.seed })
}

/// What a trim over the whole model needs: the densities, where this is asked for.
pub(crate) fn whole_model_trim(s: &Settings<'_>) -> Option<Vec<f64>> {
    (s.choice(|p| &p.trim) == Some(Trimmed::Model)).then(|| s.per_model(|p| &p.density, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_of_a_method_is_in_the_table_and_in_the_struct() {
        let fields: Vec<String> = {
            let all = PARAMETERS.iter().map(|p| p.name);
            all.map(str::to_owned).collect()
        };
        for info in METHODS {
            for name in info.parameters {
                assert!(fields.contains(&(*name).to_owned()), "{}: {name}", info.name);
            }
        }
        for info in PARAMETERS {
            assert!(METHODS.iter().any(|m| m.parameters.contains(&info.name)), "{} is nobody's", info.name);
            // A name that the struct has not is kept as unknown.
            let text = format!("{} = {}", info.name, if info.bounds == INFINITE { "true" } else { "1" });
            if let Ok(parameters) = toml::from_str::<Parameters>(&text) {
                assert!(parameters.unknown.is_empty(), "{}", info.name);
            }
        }
    }

    #[test]
    fn names_are_unique() {
        for (i, info) in METHODS.iter().enumerate() {
            assert!(METHODS[..i].iter().all(|other| other.name != info.name), "{}", info.name);
        }
    }
}

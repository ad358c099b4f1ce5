//! What makes a method of a name and of the settings that hold for one tensor.

use super::config::{DivisorChoice, Election, Parameters, Profile, ProjectionChoice, RescaleChoice, Trimmed};
use super::parameter::Parameter;
use super::registry::method;
use crate::methods::{self, Consensus, Divisor, MergeMethod, Rescale, Sign, Sparsify, TaskVectors};

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
    // What the paper, and PEFT's documentation, take for TIES and DARE.
    let paper = profile == Profile::Paper && matches!(name, "ties" | "dare_ties" | "dare_linear");
    number(&mut p.density, "density", if paper { 0.2 } else { 1.0 });
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

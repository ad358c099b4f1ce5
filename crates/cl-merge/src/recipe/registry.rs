//! All methods and all their parameters, in two tables.

use std::ops::RangeInclusive;

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

/// Names of the methods that decompose matrices, and allocate large blocks again and again for it.
#[cfg(feature = "cli")]
pub(crate) const DECOMPOSING: [&str; 5] = ["tsv", "iso_c", "iso_cts", "knots", "opcm"];

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
    number("weight", "how much of the model", "a finite number", INFINITE, true),
    number("density", "share of a task vector's entries that is kept", "0 to 1", SHARE, true),
    number("gamma", "share of a task vector's largest entries that is cut off", "0 to 1", SHARE, true),
    number(
        "epsilon",
        "half of the span of probabilities around density",
        "0 to 1, density ± epsilon within 0 to 1",
        SHARE,
        true,
    ),
    number("lambda", "scale of the merged task vector", "a finite number", INFINITE, false),
    number(
        "t",
        "place between base (0) and model (1); nearswap: how near a weight has to be",
        "a finite number",
        INFINITE,
        false,
    ),
    number("scale", "factor of the tensor", "a finite number", INFINITE, true),
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
    number("max_iter", "rounds of the iteration at most", "between 0 and 1000000", (0.0, 1e6), false),
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
        "θ₀ + δ where |δ| · KL(softmax θ₁ ‖ softmax θ₀) is at least median + 1.5 (q₃ − q₁)",
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::config::Parameters;

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

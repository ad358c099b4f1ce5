//! Problems with adapters: with each other, with their base, or with what is requested.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use cl_checkpoint::{Dtype, LayerKind};

use super::Joint;

/// A problem with adapters, or with a requested operation on them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterProblem {
    /// No adapter is given.
    #[error("no adapters given; specify at least one")]
    NoAdapters,
    /// The length of a list does not match the number of adapters.
    #[error("expected {}one for each of {adapters} adapters, got {given}", if *.or_one { "one for all or " } else { "" })]
    OnePerAdapter {
        /// Number of adapters.
        adapters: usize,
        /// Number of entries.
        given: usize,
        /// Whether a single entry would apply to all.
        or_one: bool,
    },
    /// A weight is NaN or infinite.
    #[error("its weight is {weight}; it must be a finite number")]
    Weight {
        /// The weight.
        weight: f64,
    },
    /// A density is out of range.
    #[error("density is {density}; it must be above 0 and at most 1")]
    Density {
        /// The density.
        density: f64,
    },
    /// The rank is zero.
    #[error("rank is 0; it must be at least 1")]
    RankZero,
    /// A gradient or filters are set, which only apply to whole models.
    #[error("gradients and filters are supported only for models; specify a single value")]
    Varying,
    /// The method needs the weights of models.
    #[error(
        "{method} works on the weights of models, not on updates; fold each adapter into its base and merge the models"
    )]
    OnlyForModels {
        /// The method.
        method: String,
    },
    /// There are too few or too many adapters for the method.
    #[error("{method} takes {} {} adapters, not {found}", adapters.start(), most(adapters))]
    AdapterCount {
        /// The method.
        method: String,
        /// How many it takes.
        adapters: RangeInclusive<usize>,
        /// How many there are.
        found: usize,
    },
    /// A parameter is set for `cat`, which has none.
    #[error("the method cat has no parameter `{parameter}`; it takes only weights")]
    CatParameter {
        /// The parameter.
        parameter: String,
    },
    /// A rank is set for `cat`.
    #[error("the method cat keeps all ranks; to limit the rank, use the method linear with --rank")]
    CatRank,
    /// A rank is set although factors are merged separately.
    #[error("in the space `factors`, the output has the rank of the adapters; remove rank (--rank)")]
    FactorRank,
    /// PEFT does not have this method on factors.
    #[error(
        "{method} is not one of PEFT's methods on factors ({}); use the space `delta` (--space delta)",
        known.join(", ")
    )]
    FactorMethod {
        /// The method.
        method: String,
        /// The methods that PEFT has.
        known: &'static [&'static str],
    },
    /// A parameter is set that PEFT's methods on factors do not have.
    #[error("`{parameter}` cannot be set in the space `factors`, which supports only weights, density and sign")]
    FactorParameter {
        /// The parameter.
        parameter: String,
    },
    /// Factors have different ranks and cannot be merged separately.
    #[error(
        "{} has rank {}, but {} has {}; factors A and B of different ranks cannot be merged separately; use the space \
         `delta` (--space delta)",
        adapters[0], ranks[0], adapters[1], ranks[1]
    )]
    MixedRanks {
        /// Two adapters.
        adapters: [String; 2],
        /// The rank of each.
        ranks: [usize; 2],
    },
    /// An adapter trains a tensor in addition to its factors, but factors are merged separately.
    #[error(
        "trains `{tensor}` in addition to its LoRA factors, which PEFT does not combine; use the space `delta` \
         (--space delta)"
    )]
    BesideFactors {
        /// The tensor.
        tensor: String,
    },
    /// A scaling is NaN or infinite.
    #[error("module `{module}` has the scaling {scaling}")]
    Scaling {
        /// The module.
        module: String,
        /// Its scaling.
        scaling: f64,
    },
    /// A tensor of an adapter has a dtype that cannot be combined.
    #[error("tensor `{tensor}` is {dtype:?}; expected f64, f32, f16 or bf16")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: Dtype,
    },
    /// A tensor of the base has a dtype that adapters cannot be folded into.
    #[error("the base's weight is {dtype:?}; expected f64, f32, f16 or bf16")]
    BaseDtype {
        /// Its dtype.
        dtype: Dtype,
    },
    /// A module has another kind or shape in another adapter.
    #[error(
        "module `{module}` is {kind:?} {shape:?}, but {other_kind:?} {other_shape:?} in an earlier adapter; the \
         adapters are for different bases"
    )]
    ModulesDiffer {
        /// The module.
        module: String,
        /// Kind of the layer.
        kind: LayerKind,
        /// Rows and columns of its weight.
        shape: [usize; 2],
        /// Kind of the layer in the other adapter.
        other_kind: LayerKind,
        /// Rows and columns of its weight in the other adapter.
        other_shape: [usize; 2],
    },
    /// Adapters have different bases, by the hashes in their manifests.
    #[error(
        "has a different base ({}…) than {first} ({}…), according to their manifests; to use them anyway, set \
         ignore-base (--ignore-base)",
        start(base),
        start(first_base)
    )]
    OtherBase {
        /// Hash of the base.
        base: String,
        /// The adapter that it is compared with.
        first: String,
        /// Hash of that adapter's base.
        first_base: String,
    },
    /// An adapter has another base than the given one, by the hash in its manifest.
    #[error(
        "has a different base than {}, according to its manifest; to use it anyway, set ignore-base (--ignore-base)",
        base.display()
    )]
    NotThisBase {
        /// The given base.
        base: PathBuf,
    },
    /// A module is missing from the base.
    #[error("module `{module}` is not in the base {}", base.display())]
    ModuleNotInBase {
        /// The module.
        module: String,
        /// The base.
        base: PathBuf,
    },
    /// A module's weight has another shape in the base.
    #[error("module `{module}` is for a weight of shape {shape:?}, but the weight of the base has shape {of_base:?}")]
    ModuleShape {
        /// The module.
        module: String,
        /// Rows and columns of its weight.
        shape: [usize; 2],
        /// Shape of the base's weight.
        of_base: Vec<usize>,
    },
    /// A tensor is neither a factor nor a copy of the base's, and the configuration does not mark it as trained.
    #[error(
        "tensor `{tensor}` is neither a LoRA factor nor a copy of the base's `{stands_for}`, and adapter_config.json \
         does not list it as trained; if it was trained, add its module to modules_to_save there"
    )]
    Untrained {
        /// The tensor.
        tensor: String,
        /// The base tensor that it corresponds to.
        stands_for: String,
    },
    /// A full weight is stored, and without the base it is unknown whether it is a copy.
    #[error(
        "contains the full weight `{tensor}`; specify the base (--base DIR) to check whether the weight is only a copy \
         of the base's"
    )]
    WholeWeight {
        /// The tensor.
        tensor: String,
    },
    /// A fully trained tensor is to be combined without the base.
    #[error(
        "`{tensor}` is stored in full, and is combined as its difference from the base's: specify the base (--base DIR)"
    )]
    TrainedWhole {
        /// The tensor.
        tensor: String,
    },
    /// A fully trained tensor is missing from the base.
    #[error("changes `{tensor}`, which the base {} does not have", base.display())]
    TensorNotInBase {
        /// The tensor.
        tensor: String,
        /// The base.
        base: PathBuf,
    },
    /// One adapter has factors for a tensor that another trains in full.
    #[error(
        "has LoRA factors in {factors}, but is trained in full in {}; fold the adapters one after another",
        whole.join(", ")
    )]
    FactorsAndWhole {
        /// The adapter with factors.
        factors: String,
        /// The adapters that train it in full.
        whole: Vec<String>,
    },
    /// A tensor was fully trained on different bases.
    #[error(
        "is trained in full in {}, on different bases according to their manifests, so the differences cannot be \
         added; fold the adapters one after another", adapters.join(", ")
    )]
    WholeOfOtherBases {
        /// The adapters.
        adapters: Vec<String>,
    },
    /// A trained token row is missing from the base's table.
    #[error("`{tensor}` is for token {token}, but the base has only {rows} rows")]
    TokenBeyond {
        /// The tensor with the row.
        tensor: String,
        /// Id of the token.
        token: usize,
        /// Number of rows of the base's table.
        rows: usize,
    },
    /// Trained token rows have another length than the base's.
    #[error("`{tensor}` has shape {shape:?}, but the weight of the base has shape {of_base:?}")]
    RowShape {
        /// The tensor with the rows.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Shape of the base's table.
        of_base: Vec<usize>,
    },
    /// A fully trained tensor has another shape than the base's.
    #[error("`{tensor}` has shape {shape:?}, but `{base_tensor}` of the base has shape {of_base:?}")]
    WholeShape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its name in the base.
        base_tensor: String,
        /// Its shape there.
        of_base: Vec<usize>,
    },
    /// A table has rows for new tokens, but there are other adapters or a weight.
    #[error(
        "`{tensor}` has {rows} rows, but the base has {base_rows}: tokens were added, and their rows in the base are \
         unknown; fold this adapter alone with a weight of 1, or specify a base that has these rows"
    )]
    AddedTokens {
        /// The tensor.
        tensor: String,
        /// Its number of rows.
        rows: usize,
        /// Number of rows of the base's table.
        base_rows: usize,
    },
    /// A table with rows for new tokens is to be combined.
    #[error("`{tensor}` has {rows} rows, but the base has {base_rows}; specify the base that has these rows")]
    RowsBeyondBase {
        /// The tensor.
        tensor: String,
        /// Its number of rows.
        rows: usize,
        /// Number of rows of the base's table.
        base_rows: usize,
    },
    /// Embedding and head have different numbers of rows.
    #[error(
        "with the adapters, the embedding has {embedding} rows, but the output head has {head}; if tokens were added, \
         both must be trained in full"
    )]
    HeadRows {
        /// Number of rows of the embedding.
        embedding: usize,
        /// Number of rows of the head.
        head: usize,
    },
    /// Updates have biases (`lora_bias`), and there is an update of an embedding.
    #[error(
        "`{tensor}` is a lora_bias, which PEFT does not support together with factors on an embedding (`{module}`); \
         fold the adapters instead"
    )]
    LoraBias {
        /// The bias.
        tensor: String,
        /// The embedding.
        module: String,
    },
    /// A DoRA adapter is to be combined.
    #[error(
        "a DoRA adapter scales the rows of the base, so it cannot be combined as an update; fold it into its base and, \
         if you need an adapter, extract a plain LoRA adapter from the result"
    )]
    DoraCombined,
    /// A DoRA adapter is to be folded together with others.
    #[error("a DoRA adapter can only be folded on its own; fold the adapters one after another")]
    DoraNotAlone,
    /// A DoRA adapter is to be folded with a weight other than 1.
    #[error("a DoRA adapter can only be folded with a weight of 1, not {weight}")]
    DoraWeight {
        /// The weight.
        weight: f64,
    },
    /// A tensor is missing from one of the two models of an extraction.
    #[error("has no tensor `{tensor}`, but {other} does")]
    LacksTensor {
        /// The tensor.
        tensor: String,
        /// The model that has it.
        other: String,
    },
    /// The tuned model has a head of its own, but the base has none.
    #[error(
        "the embedding and the output head are separate tensors, but tied in the base (for example, after folding an \
         adapter on one of them); their differences cannot be extracted as one adapter of a tied base"
    )]
    Untied,
    /// A tensor has different shapes in the base and the tuned model.
    #[error(
        "is {base:?} in the base, but {tuned:?} in the fine-tuned model; both models must have the same vocabulary and \
         shapes"
    )]
    ShapesDiffer {
        /// Shape in the base.
        base: Vec<usize>,
        /// Shape in the tuned model.
        tuned: Vec<usize>,
    },
    /// A tensor is floating-point in only one of the base and the tuned model.
    #[error("is {base:?} in the base, but {tuned:?} in the fine-tuned model")]
    DtypesDiffer {
        /// Dtype in the base.
        base: Dtype,
        /// Dtype in the tuned model.
        tuned: Dtype,
    },
    /// A target is not a matrix of the base.
    #[error("target `{target}` matches no linear layer or embedding of {}", base.display())]
    UnknownTarget {
        /// The target.
        target: String,
        /// The base.
        base: PathBuf,
    },
    /// An entry of `modules_to_save` is not a module of the base.
    #[error("modules_to_save: `{entry}` matches no module of {}", base.display())]
    UnknownSaved {
        /// The entry.
        entry: String,
        /// The base.
        base: PathBuf,
    },
    /// The models are equal in the requested modules.
    #[error("does not differ from {} in any of these modules", base.display())]
    NoDifference {
        /// The base.
        base: PathBuf,
    },
}

fn most(adapters: &RangeInclusive<usize>) -> String {
    if *adapters.end() == usize::MAX { "or more".to_owned() } else { format!("to {}", adapters.end()) }
}

/// Returns the start of a hash, which suffices to distinguish hashes in messages.
fn start(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

impl AdapterProblem {
    pub(super) fn joint(&self) -> Joint {
        match self {
            AdapterProblem::OtherBase { .. }
            | AdapterProblem::NotThisBase { .. }
            | AdapterProblem::FactorsAndWhole { .. }
            | AdapterProblem::WholeOfOtherBases { .. }
            | AdapterProblem::ShapesDiffer { .. }
            | AdapterProblem::DtypesDiffer { .. }
            | AdapterProblem::NoDifference { .. } => Joint::Sentence,
            _ => Joint::Colon,
        }
    }
}

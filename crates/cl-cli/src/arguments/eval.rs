//! Arguments of `cl eval`.

use std::path::PathBuf;

use cl_checkpoint::Precision;
use cl_data::Profile;
use cl_eval::cli::CompareArgs;
use cl_eval::{DEFAULT_BATCH_SEQUENCES, DEFAULT_BATCH_TOKENS};

/// Arguments of `cl eval`: a model and tasks, or a subcommand.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct EvalArgs {
    /// A subcommand.
    #[command(subcommand)]
    pub command: Option<EvalCommand>,
    /// The evaluation to run if there is no subcommand.
    #[command(flatten)]
    pub eval: Option<Args>,
}

/// Subcommands of `cl eval`.
#[derive(clap::Subcommand)]
pub enum EvalCommand {
    /// Compare two runs document by document: differences with confidence intervals, and McNemar's test.
    Compare(CompareArgs),
    /// Compute the loss on the examples of files, and the perplexity of plain text.
    Perplexity(Box<super::perplexity::Args>),
}

/// Arguments of an evaluation.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory, or a Hub name with --hub.
    pub model: PathBuf,
    /// Tasks, separated by commas: C-STANCE, FOMC, MeetingBank, Py150, ScienceQA, 20Minuten, gsm8k, gsm8k_cot, mmlu,
    /// arc_challenge, arc_easy, boolq, commonsense_qa, copa, hellaswag, lambada_openai, logiqa, mathqa, openbookqa,
    /// piqa, rte, sciq, social_iqa, truthfulqa_mc1, truthfulqa_mc2, winogrande, dbpedia, amazon, yahoo, agnews; a
    /// directory in DATA with a test file of {"prompt", "answer"}; a .toml task description; a .yaml task file of
    /// lm-evaluation-harness; or a .jsonl file of multiple-choice questions.
    #[arg(long, value_delimiter = ',', required = true)]
    pub tasks: Vec<String>,
    /// Directory of the tasks' data; those of TRACE can be in its subdirectory `trace`, those of lm-eval in `lm-eval`.
    #[arg(long, default_value = ".")]
    pub data: PathBuf,
    /// Download models, adapters and data sets that are not local files from the Hugging Face Hub: names such as
    /// organization/name or organization/name@revision (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE).
    // Not `HubArgs`: clap considers an optional group that contains another group as never given.
    #[arg(long)]
    pub hub: bool,
    /// Output directory for predictions (<task>.jsonl), scores.json and results.json (in lm-eval's layout); existing
    /// predictions are reused. With several adapters, there is a subdirectory for each.
    #[arg(long)]
    pub out: PathBuf,
    /// PEFT adapter directory; can be repeated; each is evaluated separately.
    #[arg(long)]
    pub adapter: Vec<PathBuf>,
    /// Also evaluate the model without adapters.
    #[arg(long, requires = "adapter")]
    pub base: bool,
    /// Maximum number of documents per task.
    #[arg(long)]
    pub limit: Option<usize>,
    /// Maximum number of tokens of a generated answer [default: the task's].
    #[arg(long)]
    pub max_new_tokens: Option<usize>,
    /// Number of few-shot examples [default: the task's].
    #[arg(long)]
    pub num_fewshot: Option<usize>,
    /// Random seed for drawing few-shot examples.
    #[arg(long, default_value_t = 1234)]
    pub fewshot_seed: u32,
    /// Apply the model's chat template to the prompts.
    #[arg(long)]
    pub apply_chat_template: bool,
    /// Format each few-shot example as a separate turn [default: true with --apply-chat-template].
    #[arg(long, requires = "apply_chat_template", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub fewshot_as_multiturn: Option<bool>,
    /// System instruction, placed before the task's description.
    #[arg(long)]
    pub system_instruction: Option<String>,
    /// Whether to prepend BOS to every text [default: the tokenizer's behaviour].
    #[arg(long)]
    pub add_bos_token: Option<bool>,
    /// The same for tasks of lm-evaluation-harness only: mmlu, arc_challenge, arc_easy, boolq, commonsense_qa, copa,
    /// hellaswag, lambada_openai, logiqa, mathqa, openbookqa, piqa, rte, sciq, social_iqa, truthfulqa_mc1,
    /// truthfulqa_mc2, winogrande, gsm8k, gsm8k_cot.
    #[arg(long)]
    pub lm_eval_add_bos_token: Option<bool>,
    /// Which definitions apply. paper: as in the paper, tasks of lm-evaluation-harness without BOS, and MeetingBank
    /// with the paper's ROUGE-L.
    #[arg(long, value_parser = super::values::profile(), default_value = "method")]
    pub profile: Profile,
    /// Installed lm-eval, for the few-shot examples of gsm8k_cot: a Python interpreter (python3) or the package's
    /// directory.
    #[arg(long, value_name = "PATH")]
    pub lm_eval: Option<PathBuf>,
    /// Maximum number of tokens of prompt and answer; longer prompts are truncated on the left [default: the model's
    /// context].
    #[arg(long, value_parser = super::values::count)]
    pub max_length: Option<usize>,
    /// Maximum number of tokens per forward pass.
    #[arg(long, value_parser = super::values::count, default_value_t = DEFAULT_BATCH_TOKENS)]
    pub batch_tokens: usize,
    /// Maximum number of texts generated at the same time.
    #[arg(long, value_parser = super::values::count, default_value_t = DEFAULT_BATCH_SEQUENCES)]
    pub batch_sequences: usize,
    /// Directory of the response cache [default: responses/ in CL_CACHE, or in ~/.cache/cl].
    #[arg(long)]
    pub cache: Option<PathBuf>,
    /// Do not use the response cache.
    #[arg(long, conflicts_with = "cache")]
    pub no_cache: bool,
    // Not `ComputeArgs`, for the same reason as `hub`.
    /// Dtype of the computation.
    #[arg(long, value_parser = super::values::precision(), default_value = "f32")]
    pub precision: Precision,
    /// Keep the weights of the model's linear layers in this format in memory, as in training with [train.lora] base.
    #[arg(long, value_name = "FORMAT", value_parser = ["nf4", "int8"])]
    pub quantize: Option<String>,
    /// Device: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: String,
    // Not `RankArgs`, for the same reason as `hub`.
    /// Seconds to wait for another rank, if torchrun or another launcher started several.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub rank_timeout: u64,
}

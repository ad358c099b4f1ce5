use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use cl_checkpoint::Interrupt;
use cl_checkpoint::files::write_file;
use cl_checkpoint::logging::LogArgs;
use cl_hub::HubArgs;
use cl_lab::{Pooling, read_router, router_states, run_train_router};
use cl_moe::MixConfig;
use cl_train::{Precision, final_loss, read_log};

use crate::progress::Progress;

/// Subcommands of `cl moe`.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Make a mixture of experts of a base and models tuned from it: TOML, or mergekit-moe's YAML.
    Mix(cl_moe::cli::MixArgs),
    /// Make a mixture of experts of LoRA adapters of one base, with a router per linear layer: TOML.
    Blend(cl_moe::cli::BlendArgs),
    /// Compute hidden states of the experts' prompts, to initialize routers.
    States(StatesArgs),
    /// Train the routers of a mixture; base and experts stay as they are.
    TrainRouter(TrainRouterArgs),
}

impl Command {
    /// Whether it trains, so that libtorch's threads work all the time.
    pub fn computes(&self) -> bool {
        matches!(self, Command::TrainRouter(_))
    }
}

/// Arguments of `cl moe train-router`.
#[derive(clap::Args)]
pub struct TrainRouterArgs {
    /// Configuration: model, adapter for a mixture of adapters, [data], [train], [router].
    config: PathBuf,
    /// Directory for log.jsonl, rows.json, routing.json, routing.svg, routing.png, and mixture/ or model/.
    #[arg(long)]
    out: PathBuf,
    /// Override a key of the configuration, for example --set router.load_balancing=0.01.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    hub: HubArgs,
    /// Resume an unfinished run.
    #[arg(long)]
    resume: bool,
}

/// Arguments of `cl moe states`.
#[derive(clap::Args)]
pub struct StatesArgs {
    /// Configuration of the mixture, with `positive_prompts` for each expert.
    config: PathBuf,
    /// Output file, for `router.states`.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Which hidden states of a prompt are used.
    #[arg(long, value_enum, default_value = "last")]
    pooling: PoolingArg,
    /// Dtype of the computation.
    #[arg(long, value_parser = super::precision(), default_value = "f32")]
    precision: Precision,
    /// Device: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    #[command(flatten)]
    hub: HubArgs,
    /// Replace the file if it exists.
    #[arg(long)]
    overwrite: bool,
}

/// Values of `--pooling`.
#[derive(Clone, Copy, clap::ValueEnum)]
enum PoolingArg {
    /// Those of the last token.
    Last,
    /// The mean over all tokens.
    Mean,
    /// The mean of the token embeddings, for all layers.
    Embeddings,
}

/// Runs the command.
pub fn run(command: Command, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    match command {
        Command::Mix(args) => cl_moe::cli::run(&cl_moe::cli::Command::Mix(args), interrupt, out),
        Command::Blend(args) => cl_moe::cli::run(&cl_moe::cli::Command::Blend(args), interrupt, out),
        Command::States(args) => states(&args, interrupt, out),
        Command::TrainRouter(args) => train_router(&args, log, interrupt, out),
    }
}

fn states(args: &StatesArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let file = args.out.display();
    ensure!(args.overwrite || !args.out.exists(), "{file}: exists already; add --overwrite, or choose another --out");
    ensure!(!args.out.is_dir(), "{file}: is a directory; --out must be a file");
    let mut config = MixConfig::read(&args.config)?;
    cl_moe::cli::find_models(&mut config, &args.hub.names(interrupt))?;
    let pooling = match args.pooling {
        PoolingArg::Last => Pooling::Last,
        PoolingArg::Mean => Pooling::Mean,
        PoolingArg::Embeddings => Pooling::Embeddings,
    };
    let device = cl_torch::pick_device(&args.device)?;
    let states = router_states(&config, pooling, args.precision, device)?;
    write_file(&args.out, &states)?;
    writeln!(out, "{file}: hidden states of the prompts of {} experts", config.experts.len())?;
    Ok(())
}

fn train_router(args: &TrainRouterArgs, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let mut config = read_router(&args.config, &super::read(&args.config)?, &args.set)?;
    super::locate(args.hub, &mut config.model, &mut [], interrupt)?;
    let mut progress = Progress::new(log);
    let output = run_train_router(&config, &args.out, args.resume, interrupt, &mut |e| progress.observe(e))?;
    let steps = read_log(&args.out.join("log.jsonl"))?;
    let (first, last) = (steps.first().map_or(f64::NAN, |s| s.loss), final_loss(&steps));
    writeln!(out, "{} steps, loss {first:.4} at first, mean of the last tenth {last:.4}", steps.len())?;
    for task in output.routing.iter().flat_map(|r| &r.tasks) {
        let experts = output.routing.iter().flat_map(|r| &r.experts).zip(&task.routing.gate_share);
        let shares: Vec<String> = experts.map(|(name, share)| format!("{name} {share:.2}")).collect();
        writeln!(out, "{}: gates {}", task.task, shares.join(", "))?;
    }
    writeln!(out, "mixture  {}", output.mixture.display())?;
    Ok(())
}

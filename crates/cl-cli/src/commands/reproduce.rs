use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use cl_lab::TinyConfig;

use super::study::StageArgs;
use crate::progress::Progress;

/// Configurations are TOML, whose integers are signed; a study multiplies its seeds.
const MAX_SEED: u64 = i64::MAX as u64 / 1_000_000;

/// Arguments of `cl reproduce`.
#[derive(clap::Args)]
pub struct Args {
    /// Directory for the study. The stages that are done there stay; the same command goes on after a stop.
    #[arg(long, value_name = "DIR", default_value = "target/reproduce")]
    out: PathBuf,
    /// Random seed of facts, tasks and the small base model.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=MAX_SEED))]
    seed: u64,
    /// One seed and fewer test rows, and none of the questions that the paper leaves open.
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    stages: StageArgs,
}

/// Runs the command.
pub fn run(args: &Args, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let size = if args.quick { TinyConfig::quick() } else { TinyConfig::default() };
    let tiny = TinyConfig { seed: args.seed, ..size };
    // So small a model gains a fifth from a second thread, and on a busy machine threads that wait for each other cost minutes.
    cl_torch::set_threads(1);
    if args.stages.dry_run && !args.out.join("base/model/manifest.json").exists() {
        let sketch = tempfile::tempdir()?;
        tiny.write_sketch(sketch.path())?;
        return args.stages.run(&tiny.study(sketch.path()), &args.out, None, log, interrupt, out);
    }
    let mut progress = Progress::new(log);
    tiny.write_world(&args.out, interrupt, &mut |event| progress.observe(event))?;
    // So small a training takes no memory to speak of.
    let jobs = args.stages.jobs.or_else(|| std::thread::available_parallelism().ok());
    args.stages.run(&tiny.study(&args.out), &args.out, jobs, log, interrupt, out)
}

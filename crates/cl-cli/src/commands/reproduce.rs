use std::io::Write;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_checkpoint::logging::LogArgs;
use cl_cli::arguments::reproduce::Args;
use cl_lab::TinyConfig;

use super::study::run_stages;
use crate::progress::Progress;

/// Runs the command.
pub fn run(args: &Args, log: LogArgs, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let size = if args.quick { TinyConfig::quick() } else { TinyConfig::default() };
    let tiny = TinyConfig { seed: args.seed, ..size };
    // So small a model gains a fifth from a second thread, and on a busy machine threads that wait for each other cost minutes.
    cl_torch::set_threads(1);
    if args.stages.dry_run && !args.out.join("base/model/manifest.json").exists() {
        let sketch = tempfile::tempdir()?;
        tiny.write_sketch(sketch.path())?;
        return run_stages(&args.stages, &tiny.study(sketch.path()), &args.out, None, log, interrupt, out);
    }
    let mut progress = Progress::new(log);
    tiny.write_world(&args.out, interrupt, &mut |event| progress.observe(event))?;
    // So small a training takes no memory to speak of.
    let jobs = args.stages.jobs.or_else(|| std::thread::available_parallelism().ok());
    run_stages(&args.stages, &tiny.study(&args.out), &args.out, jobs, log, interrupt, out)
}

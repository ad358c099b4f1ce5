//! `cl report`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use cl_report::{Run, StudyResults, Verdict, Written, check_place, write};

/// Arguments of `cl report`.
#[derive(clap::Args)]
#[command(after_help = "The report is a directory: index.html, which is self-contained; tables.md, tables.csv and \
    tables.tex; figures as SVG and PNG.\n\
    Runs with the same name are seeds of one method:\n  \
    cl report LoRA=runs/lora-1 LoRA=runs/lora-2 FFT=runs/fft --out report")]
pub struct Args {
    /// A study (a directory with its results.json), or directories of `cl sequence` or `cl eval`, as DIR or NAME=DIR; a
    /// run of `cl eval` with the name base is the base model.
    #[arg(required = true, value_name = "[NAME=]RUN")]
    runs: Vec<String>,
    /// Output directory. An existing report is replaced; any other existing directory is an error.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Tasks of old knowledge, separated by commas; by default, those of the first sequence.
    #[arg(long, value_delimiter = ',')]
    old: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args, out: &mut impl Write) -> Result<()> {
    check_place(&args.out)?;
    let runs: Vec<Run> = args.runs.iter().map(|text| Run::parse(text)).collect();
    let inputs: Vec<_> = runs.iter().map(|r| ("a run", r.path.as_path())).collect();
    // A report may be inside the directory of its study, but must not replace a run or a directory that contains one.
    for input in inputs.iter().filter(|(_, path)| !args.out.starts_with(path) || args.out == *path) {
        cl_checkpoint::refuse_overlap(&args.out, &[*input])?;
    }
    let results = StudyResults::read(&runs, &args.old)?;
    print(&write(&results, &args.out)?, out)
}

/// Prints the paper's claims with their verdicts, and the path of the report.
pub fn print(written: &Written, out: &mut impl Write) -> Result<()> {
    for finding in written.findings.iter().filter(|f| f.verdict != Verdict::NotRun) {
        let numbers = match (finding.estimate, finding.interval) {
            (Some(value), Some((low, high))) => format!(" {value:+.4} ({low:+.4} to {high:+.4}), {}", finding.method),
            (Some(value), None) => format!(" {value:+.4}, {}", finding.method),
            _ => format!(" {}", finding.method),
        };
        writeln!(out, "{}: {}{numbers}", finding.verdict.words(), finding.claim)?;
    }
    writeln!(out, "{} tables, {} figures", written.tables, written.figures)?;
    Ok(writeln!(out, "report {}", written.page.display())?)
}

//! `cl publish`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use cl_checkpoint::Interrupt;
use cl_hub::{Hub, PublishOptions, publish};

/// Arguments of `cl publish`.
#[derive(clap::Args)]
pub struct Args {
    /// Model or adapter directory.
    dir: PathBuf,
    /// Repository on the Hub.
    #[arg(long, value_name = "ORG/NAME")]
    repo: String,
    /// Print the model card and the files to upload; write and upload nothing.
    #[arg(long)]
    dry_run: bool,
    /// Write a copy of the directory with the model card.
    #[arg(long, value_name = "DIR", conflicts_with = "dry_run", required_unless_present_any = ["dry_run", "upload"])]
    out: Option<PathBuf>,
    /// Upload to the Hub in one commit (HF_ENDPOINT, HF_TOKEN). Files that already exist there are not uploaded again.
    #[arg(long, conflicts_with = "dry_run")]
    upload: bool,
    /// Make a new repository private.
    #[arg(long)]
    private: bool,
    /// Base model on the Hub, instead of those in the manifest; can be repeated.
    #[arg(long, value_name = "ORG/NAME")]
    base_model: Vec<String>,
    /// Licence by its identifier, such as apache-2.0 [default: the base's, if it is in the Hub cache].
    #[arg(long, value_name = "ID")]
    license: Option<String>,
    /// Data set on the Hub that the model was trained on; can be repeated.
    #[arg(long, value_name = "ORG/NAME")]
    dataset: Vec<String>,
    /// Scores for the card: results.json of `cl eval`; can be repeated.
    #[arg(long, value_name = "FILE")]
    results: Vec<PathBuf>,
    /// First line of the commit message.
    #[arg(long, value_name = "TEXT", default_value = "Upload with cl")]
    message: String,
}

/// Runs the command.
pub fn run(args: &Args, interrupt: &Interrupt, out: &mut impl Write) -> Result<()> {
    let hub = Hub::from_env();
    let options = PublishOptions {
        repo: args.repo.clone(),
        base_models: args.base_model.clone(),
        license: args.license.clone(),
        datasets: args.dataset.clone(),
        results: args.results.clone(),
    };
    let publication = publish(&args.dir, &hub, &options)?;
    for note in &publication.notes {
        tracing::warn!("{note}");
    }
    let (count, megabytes) = (publication.files.len(), publication.bytes()? as f64 / 1e6);
    if args.dry_run {
        writeln!(out, "{}", publication.card)?;
        for file in &publication.files {
            writeln!(out, "{:>12}  {}", file.content.size()?, file.name)?;
        }
        writeln!(out, "{count} files, {megabytes:.1} MB, for {}; nothing was written or sent", args.repo)?;
        return Ok(());
    }
    if let Some(dir) = &args.out {
        publication.write(dir)?;
        writeln!(out, "{}: {count} files, {megabytes:.1} MB", dir.display())?;
    }
    if args.upload {
        let done = hub.upload(&args.repo, args.private, &publication.files, &args.message, interrupt)?;
        let sent = done.bytes as f64 / 1e6;
        match done.commit {
            Some(commit) => writeln!(
                out,
                "{}: commit {commit}, {} files, {} unchanged, {sent:.1} MB of large files sent",
                args.repo, done.sent, done.unchanged
            )?,
            None => writeln!(out, "{}: all {} files are already there", args.repo, done.unchanged)?,
        }
    }
    Ok(())
}

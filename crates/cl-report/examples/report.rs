//! `cl report` without libtorch: `cargo run -p cl-report --example report -- OUT [NAME=]RUN…`

use std::path::Path;

use cl_report::{Error, Run, StudyResults, write};

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let out = arguments.next().unwrap_or("report".to_owned());
    let runs: Vec<Run> = arguments.map(|text| Run::parse(&text)).collect();
    let written = write(&StudyResults::read(&runs, &[])?, Path::new(&out))?;
    println!("{} tables, {} figures: {}", written.tables, written.figures, written.page.display());
    for finding in written.findings {
        println!("{}: {}", finding.verdict.words(), finding.claim);
    }
    Ok(())
}

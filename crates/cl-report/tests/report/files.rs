//! The files of a report.

use std::fs;
use std::path::Path;

use cl_report::{Error, StudyResults, Verdict, findings, write};

use crate::invented::{HOSTILE, study};

fn text(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(name)).unwrap()
}

#[test]
fn everything_is_written_and_nothing_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    // To inspect the report, set CL_REPORT_KEEP to a directory that is kept.
    let out = std::env::var_os("CL_REPORT_KEEP").map_or(folder.path().join("report"), Into::into);
    let written = write(&study(), &out).unwrap();
    let page = text(&out, "index.html");
    for outside in ["http://", "https://", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "the page loads `{outside}`");
    }
    assert_eq!(written.page, out.join("index.html"));
    assert_eq!(written.figures, 15, "the paper's ten and five more");
    for figure in 1..=15 {
        let svg = text(&out, &format!("figures/figure-{figure}.svg"));
        assert!(svg.starts_with("<svg xmlns") && svg.contains("prefers-color-scheme: dark"));
        let png = fs::read(out.join(format!("figures/figure-{figure}.png"))).unwrap();
        assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
        assert!(page.contains(&format!("id=\"figure-{figure}\"")));
    }
    let routing = text(&out, "figures/figure-15.svg");
    // Shares of a round's own expert and of each other expert: 62.5 and 12.5 % among four, 57 and 7 % among seven.
    for part in ["LoRA MoE", "FFT MoE, 4 of 7", ">62<", ">12<", ">57<", ">7<"] {
        assert!(routing.contains(part), "{part}");
    }
    for table in 1..=written.tables - 1 {
        assert!(page.contains(&format!("id=\"table-{table}\"")));
        assert!(text(&out, "tables.md").contains(&format!("### Table {table}. ")));
        assert!(text(&out, "tables.csv").contains(&format!("\nTable {table},")));
        assert!(text(&out, "tables.tex").contains(&format!("\\label{{tab:table-{table}}}")));
    }
    assert_eq!(StudyResults::read_file(&out.join("results.json")).unwrap().rows.len(), study().rows.len());
}

#[test]
fn names_are_text_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("report");
    write(&study(), &out).unwrap();
    for file in ["index.html", "tables.md", "figures/figure-7.svg", "figures/figure-9.svg"] {
        let text = text(&out, file);
        assert!(!text.contains("<script>alert"), "{file}");
        assert!(text.contains("&lt;script&gt;alert") || text.contains("&lt;script&gt;al"), "{file} lacks the method");
    }
    assert!(!text(&out, "index.html").contains("<b>& more"), "the study's name");
    let latex = text(&out, "tables.tex");
    assert!(latex.contains(
        r#"\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{} \& "DARE" | \textbackslash{}\%\_\$"#
    ));
    assert!(text(&out, "tables.csv").contains(&format!("\"{}\"", HOSTILE.replace('"', "\"\""))));
}

#[test]
fn the_papers_numbers_stand_beside_ours() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("report");
    write(&study(), &out).unwrap();
    let csv = text(&out, "tables.csv");
    let cell = |start: &str| {
        let line = csv.lines().find(|l| l.starts_with(start)).unwrap_or_else(|| panic!("no line `{start}`"));
        let fields: Vec<f64> = line.rsplit(',').take(2).map(|f| f.parse().unwrap_or(f64::NAN)).collect();
        let value: f64 = line[start.len()..].split(',').next().unwrap().parse().unwrap();
        (value, fields[1], fields[0])
    };
    for (start, printed) in [
        ("Table 1,FFT 1-3,mmlu,", 0.2594),
        ("Table 2,\"LoRA 1,2\",piqa,", 0.8118),
        ("Table 2,gain base,AVE,", -0.01),
        ("Table 3,gain base,AVE,", 0.6),
        ("Table 4,BWT,science,", -0.41),
        ("Table 5,Joint-LoRA,AVE,", 0.6524),
        ("Table 6,base,AVnew,", 0.352),
        // Swapped with AVall in the paper.
        ("Table 6,FFT-Rep,AVnew,", 0.633),
        ("Table 6,FFT-Rep,AVall,", 0.621),
    ] {
        let (value, paper, delta) = cell(start);
        assert_eq!(paper, printed, "{start}");
        assert!((value - printed - delta).abs() < 1e-12, "{start}");
    }
    assert!(text(&out, "tables.md").contains("0.6330†"));
}

#[test]
fn findings_follow_from_the_formulas() {
    let all = findings(&study());
    let verdict = |start: &str| {
        let found = all.iter().find(|f| f.claim.starts_with(start)).unwrap_or_else(|| panic!("{start}: {all:#?}"));
        assert!(found.interval.is_none_or(|(low, high)| low <= high));
        (found.verdict, found.seeds)
    };
    assert_eq!(verdict("LoRA forgets"), (Verdict::Holds, 3));
    assert_eq!(verdict("Replay restores what sequential LoRA"), (Verdict::Holds, 3));
    assert_eq!(verdict("Replay restores what sequential FFT"), (Verdict::Holds, 3));
    assert_eq!(verdict("A large λ of o-lora costs"), (Verdict::Holds, 3));
    assert_eq!(verdict("A large λ of o-lora saves"), (Verdict::Holds, 3));
    assert_eq!(verdict("TIES"), (Verdict::Holds, 2), "one seed lacks a score");
    // FFT-MoE has a missing column, so there is no average over all columns.
    assert_eq!(verdict("Mixtures"), (Verdict::Inconclusive, 0));
    let paper = all.iter().find(|f| f.claim.starts_with("LoRA forgets")).unwrap().paper.unwrap();
    assert!((paper - (0.6541 - 0.6195)).abs() < 1e-12);
}

#[test]
fn what_was_not_run_is_said() {
    let mut results = study();
    results.rows.retain(|r| r.method == "LoRA" || r.method == "base");
    let all = findings(&results);
    assert!(all.iter().all(|f| f.verdict == Verdict::NotRun), "{all:#?}");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("report");
    write(&results, &out).unwrap();
    assert!(
        text(&out, "tables.md").contains("Not run: these results have no sequence `FFT`".replace('`', "\\`").as_str())
    );
    assert!(text(&out, "index.html").contains("Not run: these results have no models for this figure."));
}

#[test]
fn a_report_is_replaced_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("report");
    write(&study(), &out).unwrap();
    let first = text(&out, "index.html");
    write(&study(), &out).unwrap();
    assert_eq!(text(&out, "index.html"), first, "equal results, equal bytes");
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("mine.txt"), "mine").unwrap();
    assert!(matches!(write(&study(), &other), Err(Error::NotAReport { .. })));
    assert_eq!(text(&other, "mine.txt"), "mine");
    fs::write(out.join("mine.txt"), "mine").unwrap();
    assert!(write(&study(), &out).is_err(), "a file that is not the report's");
    assert_eq!(text(&out, "mine.txt"), "mine");
}

#[test]
fn inconsistent_results_are_refused() {
    let refused = |spoil: fn(&mut StudyResults)| {
        let mut results = study();
        spoil(&mut results);
        results.check().unwrap_err().to_string()
    };
    assert!(refused(|r| r.rows[1].scores.truncate(3)).ends_with("has 3 scores for 15 columns"));
    assert!(refused(|r| r.rows[1].standard_errors.truncate(3)).ends_with("has 3 standard errors for 15 columns"));
    assert!(refused(|r| r.rows[1].round = Some(9)).ends_with("is of round 9; the study has rounds 1 to 7"));
    assert!(refused(|r| r.rows[1].stage = r.rows[0].stage.clone()).contains("is listed twice"));
    assert!(refused(|r| r.columns.clear()).contains("no columns"));
}

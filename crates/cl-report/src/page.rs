//! The HTML page, a single self-contained file.

use minijinja::{Environment, context};
use serde::Serialize;

use crate::error::Error;
use crate::figures::{Figure, NARROW, WIDE};
use crate::findings::{Finding, Verdict};
use crate::format::{Format, NONE};
use crate::paper::NOTES;
use crate::section::Section;
use crate::study::Study;
use crate::svg::{Canvas, Paint, Theme, rules};
use crate::table::{Cell, READING, ReportTable};

const TEMPLATE: &str = include_str!("page.html");

/// Renders the page.
pub(crate) fn render(
    study: &Study,
    tables: &[(Section, ReportTable)],
    figures: &[(Section, Figure)],
    findings: &[Finding],
) -> Result<String, Error> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.add_template("page.html", TEMPLATE)?;
    let results = study.results;
    let rounds: Vec<&str> = results.rounds.iter().map(String::as_str).collect();
    let seeds: Vec<String> = results.seeds.iter().map(u64::to_string).collect();
    let sections: Vec<SectionView> = Section::ALL.into_iter().filter_map(|s| section(s, tables, figures)).collect();
    // The paper's claims are shown without data only in the paper's study.
    let shown = |f: &&Finding| study.has_paper() || f.verdict != Verdict::NotRun;
    let findings: Vec<&Finding> = findings.iter().filter(shown).collect();
    let page = environment.get_template("page.html")?.render(context! {
        light => rules(Theme::Light),
        dark => rules(Theme::Dark),
        name => results.name,
        description => results.description,
        model => results.model,
        seeds => seeds.join(", "),
        rounds => rounds.join(" → "),
        models => study.models.len(),
        columns => columns(study),
        sections,
        findings => finding_views(&findings),
        notes => results.notes,
        paper_notes => if study.has_paper() { NOTES.to_vec() } else { Vec::new() },
        reading => READING,
        version => env!("CARGO_PKG_VERSION"),
    })?;
    Ok(page)
}

#[derive(Serialize)]
struct SectionView {
    id: &'static str,
    title: &'static str,
    about: &'static str,
    figures: Vec<FigureView>,
    tables: Vec<TableView>,
}

#[derive(Serialize)]
struct FigureView {
    id: String,
    label: String,
    title: String,
    caption: String,
    source: String,
    wide: Option<String>,
    narrow: Option<String>,
}

#[derive(Serialize)]
struct TableView {
    id: String,
    label: String,
    title: String,
    caption: String,
    source: String,
    missing: Option<String>,
    columns: Vec<String>,
    rows: Vec<RowView>,
}

#[derive(Serialize)]
struct RowView {
    name: String,
    summary: bool,
    cells: Vec<CellView>,
}

#[derive(Serialize)]
struct CellView {
    sort: Option<f64>,
    main: String,
    uncertainty: Option<String>,
    paper: Option<String>,
    delta: Option<String>,
    tip: String,
}

#[derive(Serialize)]
struct FindingView {
    claim: String,
    measure: String,
    verdict: &'static str,
    class: &'static str,
    estimate: Option<String>,
    interval: Option<String>,
    method: String,
    paper: Option<String>,
    bar: Option<String>,
}

#[derive(Serialize)]
struct ColumnView {
    name: String,
    group: &'static str,
    metric: String,
    round: Option<usize>,
    chance: Option<String>,
    paper: Option<String>,
}

fn columns(study: &Study) -> Vec<ColumnView> {
    let view = |c: &crate::results::Column| ColumnView {
        name: c.name.clone(),
        group: if c.group == cl_eval::Group::Old { "old knowledge" } else { "new task" },
        metric: c.metric.clone(),
        round: c.round,
        chance: c.chance.map(|v| Format::Score(3).text(v)),
        paper: c.paper.clone(),
    };
    study.columns().iter().map(view).collect()
}

fn section(section: Section, tables: &[(Section, ReportTable)], figures: &[(Section, Figure)]) -> Option<SectionView> {
    let figures: Vec<FigureView> = figures.iter().filter(|(s, _)| *s == section).map(|(_, f)| figure(f)).collect();
    let tables: Vec<TableView> = tables.iter().filter(|(s, _)| *s == section).map(|(_, t)| table(t)).collect();
    let (id, title, about) = (section.id(), section.title(), section.about());
    (!figures.is_empty() || !tables.is_empty()).then_some(SectionView { id, title, about, figures, tables })
}

fn figure(figure: &Figure) -> FigureView {
    let title = format!("{}. {}", figure.label, figure.title);
    let draw = |wide: f64, class: &str| figure.chart.as_ref().map(|c| c.draw(wide).inline(class, &title));
    FigureView {
        id: figure.id.clone(),
        label: figure.label.clone(),
        title: figure.title.clone(),
        caption: figure.caption.clone(),
        source: plain(&figure.source),
        wide: draw(WIDE, "wide"),
        narrow: draw(NARROW, "narrow"),
    }
}

fn table(table: &ReportTable) -> TableView {
    let cell = |c: &Cell| CellView {
        sort: c.value.as_ref().map(|v| v.mean),
        main: c.main(),
        uncertainty: c.uncertainty(),
        paper: c.printed(),
        delta: c.delta().map(|d| c.format.unwrap_or(Format::Score(4)).difference(d)),
        tip: c.details(),
    };
    let row = |r: &crate::table::Row| RowView {
        name: r.name.clone(),
        summary: r.summary,
        cells: r.cells.iter().map(cell).collect(),
    };
    TableView {
        id: table.id.clone(),
        label: table.label.clone(),
        title: table.title.clone(),
        caption: table.caption.clone(),
        source: plain(&table.source),
        missing: table.missing.clone(),
        columns: table.columns.clone(),
        rows: table.rows.iter().map(row).collect(),
    }
}

fn plain(source: &str) -> String {
    source.replace('`', "")
}

fn finding_views(findings: &[&Finding]) -> Vec<FindingView> {
    let ends = findings.iter().flat_map(|f| {
        let interval = f.interval.map(|(low, high)| [low, high]);
        interval.into_iter().flatten().chain(f.estimate).chain(f.paper)
    });
    // An interval over two seeds may be wider than all scores; limit the axis, so that the others remain readable.
    let reach = ends.fold(0.05f64, |reach, v| reach.max(v.abs())).min(0.5);
    findings.iter().map(|f| finding(f, reach)).collect()
}

fn finding(finding: &Finding, reach: f64) -> FindingView {
    let signed = |v: f64| Format::Signed.text(v);
    FindingView {
        claim: finding.claim.clone(),
        measure: finding.measure.clone(),
        verdict: finding.verdict.words(),
        class: match finding.verdict {
            Verdict::Holds => "yes",
            Verdict::DoesNotHold => "no",
            Verdict::Inconclusive => "open",
            Verdict::NotRun => "none",
        },
        estimate: finding.estimate.map(signed),
        interval: finding.interval.map(|(low, high)| format!("{} to {}", signed(low), signed(high))),
        method: finding.method.clone(),
        paper: finding.paper.map(signed),
        bar: finding.estimate.map(|estimate| bar(finding, estimate, reach)),
    }
}

/// Draws a small chart of an interval around zero.
fn bar(finding: &Finding, estimate: f64, reach: f64) -> String {
    let (wide, middle) = (200.0, 11.0);
    let mut canvas = Canvas::new(wide);
    canvas.height = 22.0;
    let x = |v: f64| wide / 2.0 + (v / reach).clamp(-1.0, 1.0) * (wide / 2.0 - 8.0);
    canvas.line((4.0, middle), (wide - 4.0, middle), Paint::Grid, 1.0, "");
    canvas.line((wide / 2.0, 2.0), (wide / 2.0, 20.0), Paint::Muted, 1.2, "");
    let paint = match finding.verdict {
        Verdict::Holds => Paint::Series(1),
        Verdict::DoesNotHold => Paint::Series(2),
        _ => Paint::Series(0),
    };
    let interval = finding.interval.map_or(NONE.to_owned(), |(low, high)| {
        canvas.line((x(low), middle), (x(high), middle), paint, 3.0, "");
        format!("{} to {}", Format::Signed.text(low), Format::Signed.text(high))
    });
    let tip = format!("{}: {}, interval {interval}", finding.measure, Format::Signed.text(estimate));
    canvas.circle((x(estimate), middle), 5.0, paint, &tip);
    if let Some(paper) = finding.paper {
        canvas.diamond((x(paper), middle), 4.2, &format!("paper {}", Format::Signed.text(paper)));
    }
    canvas.inline("interval", &tip)
}

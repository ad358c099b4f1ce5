//! The tables of a study: those of the paper, then additional ones.

use cl_eval::ScoreMatrix;

use crate::format::Format;
use crate::paper::{MODEL, Paper, Printed};
use crate::results::RowKind;
use crate::section::{Section, source};
use crate::study::{GainOf, Model, Span, Study};
use crate::table::{Cell, ReportTable, Row};

/// Returns all tables with their sections, in order.
pub(crate) fn all(study: &Study, paper: &Paper) -> Vec<(Section, ReportTable)> {
    let builder = Builder { study, paper };
    let mut tables = vec![(Section::Overview, builder.overview())];
    let mut numbered: Vec<(Section, ReportTable)> = [
        (Section::Sequence, builder.rounds("FFT", Span::Old, 1)),
        (Section::Sequence, builder.rounds("LoRA", Span::Old, 2)),
        (Section::Sequence, builder.rounds("FFT", Span::New, 3)),
        (Section::Sequence, builder.rounds("LoRA", Span::New, 4)),
        (Section::FullyCooperative, builder.fully_cooperative(Span::Old)),
        (Section::FullyCooperative, builder.fully_cooperative(Span::New)),
    ]
    .into_iter()
    // The paper's tables are shown without data only in the paper's study.
    .filter(|(_, table)| study.has_paper() || table.missing.is_none())
    .collect();
    numbered.extend(builder.one_round().map(|t| (Section::OneRound, t)));
    numbered.extend(builder.semi_cooperative().map(|t| (Section::SemiCooperative, t)));
    numbered.extend(builder.merged().map(|t| (Section::SemiCooperative, t)));
    numbered.extend(builder.other_sequences().into_iter().map(|t| (Section::Beyond, t)));
    numbered.extend(builder.questions().into_iter().map(|t| (Section::Questions, t)));
    for (place, (_, table)) in numbered.iter_mut().enumerate() {
        table.label = format!("Table {}", place + 1);
        table.id = format!("table-{}", place + 1);
    }
    tables.extend(numbered);
    tables
}

struct Builder<'s, 'r> {
    study: &'s Study<'r>,
    paper: &'s Paper,
}

impl<'r> Builder<'_, 'r> {
    /// Tables 1 to 4: a sequence after each round.
    fn rounds(&self, method: &str, span: Span, number: usize) -> ReportTable {
        let what = if span == Span::Old { "old knowledge" } else { "new tasks" };
        let title = format!("Sequential {method}: {what} after each round");
        let Some(last) = self.study.sequence(method).filter(|_| !self.study.places(span).is_empty()) else {
            let missing = Some(format!("Not run: these results have no sequence `{method}` scored on {what}."));
            return ReportTable { title, missing, ..ReportTable::default() };
        };
        let mut table = ReportTable { title, columns: self.headers(span), ..ReportTable::default() };
        table.rows.extend(self.base_row(span));
        let rounds = self.study.rounds_of(last);
        table.rows.extend(rounds.iter().map(|m| self.scores(&round_name(m), m, span)));
        table.rows.push(self.gains(last, span, number));
        if span == Span::New {
            table.rows.push(self.bwt(last, span, number));
        }
        let of = match span {
            Span::Old => "the mean of the columns' gains",
            _ => {
                "the gain of the columns' mean; BWT: final score over the score right after the task's own round, minus one"
            }
        };
        table.caption = format!(
            "{} Rows are rounds in the order {}. AVE: mean of the columns. Gain base: last round over the base, minus one, whose average is {of}.{}",
            self.seeds(last),
            self.order(),
            self.beside()
        );
        table.source = source(rounds.iter().copied().chain(self.study.base()));
        table
    }

    /// Tables 5 and 6: joint training compared with sequences with and without replay.
    fn fully_cooperative(&self, span: Span) -> ReportTable {
        let what = if span == Span::Old { "old knowledge" } else { "new tasks" };
        let title = format!("Fully cooperative setting: {what}");
        let models = self.study.fully_cooperative();
        if models.is_empty() || self.study.places(span).is_empty() {
            let missing = Some("Not run: these results have neither joint training nor replay.".to_owned());
            return ReportTable { title, missing, ..ReportTable::default() };
        }
        let mut columns = self.headers(span);
        if span == Span::New {
            columns.pop();
            columns.extend([Span::New.name(), Span::All.name()].map(str::to_owned));
        }
        let mut table = ReportTable { title, columns, ..ReportTable::default() };
        table.rows.extend(self.base_row(span));
        table.rows.extend(models.iter().map(|m| self.scores(m.method, m, span)));
        if span == Span::New {
            let with_row = self.study.base().into_iter().chain(models.iter().copied());
            for (row, model) in table.rows.iter_mut().zip(with_row) {
                row.cells.push(self.average(model, Span::All));
            }
        }
        table.caption = format!(
            "{} Sequences after their last round beside joint training on all tasks at once. {}{}",
            self.seeds(models[0]),
            if span == Span::New {
                "AVnew: mean of these columns; AVall: mean of these and the old ones."
            } else {
                "AVE: mean of the columns."
            },
            self.beside()
        );
        table.source = source(models.into_iter().chain(self.study.base()));
        table
    }

    /// All methods of the main comparison, with one row each.
    fn overview(&self) -> ReportTable {
        let models: Vec<&Model> = self.study.base().into_iter().chain(self.study.finals()).collect();
        let columns = [
            "AVold",
            "AVnew",
            "AVall",
            "gain old",
            "(of means)",
            "gain new",
            "(of means)",
            "BWT",
            "BWT abs.",
            "forgetting",
            "forward",
            "time",
            "size",
        ];
        let mut table = ReportTable {
            id: "overview".to_owned(),
            label: "Overview".to_owned(),
            title: "Every method after its last step".to_owned(),
            columns: columns.map(str::to_owned).to_vec(),
            ..ReportTable::default()
        };
        table.rows = models.iter().map(|m| self.overview_row(m)).collect();
        table.caption = format!(
            "{} AVold, AVnew, AVall: means of the old, new and all columns. Gains over the base as the mean of the columns' gains and \
             (of means) as the gain of their mean. BWT: relative, as the paper prints it; BWT abs.: final score minus the score right after \
             the task's own round; forgetting: best earlier score since minus the final one; forward: score right before the task's own \
             round minus the base's; each a mean over the tasks that have one. Time and size: what the method's steps took and \
             stored, for a sequence of all its rounds.{}",
            models.first().map_or(String::new(), |m| self.seeds(m)),
            self.beside()
        );
        table.source = source(models);
        table
    }

    fn overview_row(&self, model: &Model<'r>) -> Row {
        let study = self.study;
        let mut cells: Vec<Cell> = [Span::Old, Span::New, Span::All].map(|span| self.average(model, span)).into();
        for span in [Span::Old, Span::New] {
            for of in [GainOf::Columns, GainOf::Means] {
                let gain = if model.kind == RowKind::Base { None } else { study.average_gain(model, span, of) };
                cells.push(Cell::new(gain, Format::Percent));
            }
        }
        let figure = |format, f: fn(&ScoreMatrix, usize) -> Option<f64>| {
            Cell::new(study.of_matrix(model, |m| m.mean_of(f)), format)
        };
        cells.push(figure(Format::Percent, ScoreMatrix::relative_bwt));
        cells.push(figure(Format::Signed, ScoreMatrix::absolute_bwt));
        cells.push(figure(Format::Signed, ScoreMatrix::forgetting));
        cells.push(figure(Format::Signed, ScoreMatrix::forward_transfer));
        let (seconds, bytes) = study.cost(model);
        cells.extend([Cell::new(seconds, Format::Seconds), Cell::new(bytes, Format::Bytes)]);
        Row { name: self.name(model), cells, summary: false }
    }

    /// Models of each round trained alone.
    fn one_round(&self) -> Option<ReportTable> {
        let alone = |m: &&Model| m.main && m.kind == RowKind::OneRound;
        let models: Vec<&Model> = self.study.models.iter().filter(alone).collect();
        let name = |m: &Model| format!("{} {}", m.method, self.round(m.round));
        self.plain(&models, "One round on the base model", "Each row is the base model tuned on one task alone.", &name)
    }

    /// The data of Figures 7, 9 and 10.
    fn semi_cooperative(&self) -> Option<ReportTable> {
        let models = self.study.semi_cooperative();
        let caption = "Methods that need the models of earlier rounds but not their data.";
        self.plain(&models, "Semi-cooperative setting: every task", caption, &|m| self.name(m))
    }

    /// Merges by the number of models.
    fn merged(&self) -> Option<ReportTable> {
        let merges =
            |m: &&Model| m.main && matches!(m.kind, RowKind::Merge | RowKind::MixtureOfExperts) && m.members.is_some();
        let mut models: Vec<&Model> = self.study.models.iter().filter(merges).collect();
        let several = models.iter().any(|a| models.iter().any(|b| a.method == b.method && a.members != b.members));
        models.sort_by_key(|m| {
            (self.study.models.iter().position(|o| (o.kind, o.method) == (m.kind, m.method)), m.members)
        });
        let name = |m: &Model| format!("{} of {}", m.method, m.members.unwrap_or(0));
        let caption = "Merges and mixtures of more and more models, in the order of the rounds.";
        self.plain(&models, "Number of models combined", caption, &name).filter(|_| several)
    }

    /// Sequences other than plain FFT and LoRA, round by round.
    fn other_sequences(&self) -> Vec<ReportTable> {
        let others = self.study.finals_of(RowKind::Sequence).into_iter();
        let others = others.filter(|m| !["lora", "fft"].contains(&m.method.to_lowercase().as_str()));
        let table = |last: &Model<'r>| {
            let rounds = self.study.rounds_of(last);
            let caption = format!("Rows are rounds in the order {}.", self.order());
            let title = format!("Sequence {}: every task after each round", last.method);
            let mut table = self.plain(&rounds, &title, &caption, &round_name)?;
            let mut gains = self.gain_cells(last, Span::All);
            gains.push(Cell::new(self.study.average_gain(last, Span::Old, GainOf::Columns), Format::Percent));
            gains.push(Cell::new(self.study.average_gain(last, Span::New, GainOf::Means), Format::Percent));
            gains.push(Cell::new(self.study.average_gain(last, Span::All, GainOf::Means), Format::Percent));
            table.rows.push(Row { name: "gain base".to_owned(), cells: gains, summary: true });
            let places = self.study.places(Span::All);
            let mut bwt: Vec<Cell> = places.iter().map(|&c| self.bwt_cell(last, c)).collect();
            let average = self.study.of_matrix(last, |m| m.mean_of(ScoreMatrix::relative_bwt));
            bwt.extend([Cell::default(), Cell::new(average, Format::Percent), Cell::default()]);
            table.rows.push(Row { name: "BWT".to_owned(), cells: bwt, summary: true });
            Some(table)
        };
        others.filter_map(table).collect()
    }

    /// One table per open question.
    fn questions(&self) -> Vec<ReportTable> {
        let table = |question: &str| {
            let models: Vec<&Model> = self.study.models.iter().filter(|m| m.question == Some(question)).collect();
            let several = |m: &Model| models.iter().filter(|o| (o.kind, o.method) == (m.kind, m.method)).count() > 1;
            let name = |m: &Model| match (m.round, m.members) {
                (Some(round), _) if several(m) => format!("{} 1–{round}", m.method),
                (_, Some(members)) if several(m) => format!("{} of {members}", m.method),
                _ => m.method.to_owned(),
            };
            self.plain(&models, question, "A question beside the main comparison.", &name)
        };
        self.study.questions().into_iter().filter_map(table).collect()
    }

    /// Rows of scores on all columns, with the three averages; the base comes first.
    fn plain(
        &self,
        models: &[&Model<'r>],
        title: &str,
        caption: &str,
        name: &dyn Fn(&Model<'r>) -> String,
    ) -> Option<ReportTable> {
        let first = models.first()?;
        let mut columns: Vec<String> =
            self.study.places(Span::All).iter().map(|&c| self.study.columns()[c].name.clone()).collect();
        columns.extend([Span::Old, Span::New, Span::All].map(|s| s.name().to_owned()));
        let row = |name: String, model: &Model<'r>| {
            let mut cells = self.score_cells(model, Span::All);
            cells.extend([Span::Old, Span::New, Span::All].map(|span| self.average(model, span)));
            Row { name, cells, summary: false }
        };
        let mut rows: Vec<Row> = self.study.base().map(|base| row("base".to_owned(), base)).into_iter().collect();
        rows.extend(models.iter().map(|m| row(name(m), m)));
        let caption = format!(
            "{} {caption} AVold, AVnew, AVall: means of the old, new and all columns.{}",
            self.seeds(first),
            self.beside()
        );
        let source = source(models.iter().copied().chain(self.study.base()));
        Some(ReportTable { title: title.to_owned(), caption, columns, rows, source, ..ReportTable::default() })
    }

    /// Headers of a span: the average comes first for old knowledge and last for new knowledge, as in the paper.
    fn headers(&self, span: Span) -> Vec<String> {
        let names = self.study.places(span).into_iter().map(|c| self.study.columns()[c].name.clone());
        self.with_average(names.collect(), span, "AVE".to_owned())
    }

    fn with_average<T>(&self, mut cells: Vec<T>, span: Span, average: T) -> Vec<T> {
        cells.insert(if span == Span::Old { 0 } else { cells.len() }, average);
        cells
    }

    fn base_row(&self, span: Span) -> Option<Row> {
        Some(self.scores("base", self.study.base()?, span))
    }

    fn scores(&self, name: &str, model: &Model<'r>, span: Span) -> Row {
        let cells = self.with_average(self.score_cells(model, span), span, self.average(model, span));
        Row { name: name.to_owned(), cells, summary: false }
    }

    fn score_cells(&self, model: &Model<'r>, span: Span) -> Vec<Cell> {
        let cell = |&c: &usize| {
            let printed = self.study.columns()[c].paper.as_deref().and_then(|column| self.printed(model, column));
            Cell::new(self.study.score(model, c), Format::Score(4)).beside(printed)
        };
        self.study.places(span).iter().map(cell).collect()
    }

    fn average(&self, model: &Model<'r>, span: Span) -> Cell {
        let printed = if self.complete(span) { self.printed(model, span.name()) } else { None };
        Cell::new(self.study.average(model, span), Format::Score(4)).beside(printed)
    }

    fn printed(&self, model: &Model<'r>, column: &str) -> Option<Printed> {
        let label = match model.kind {
            RowKind::Base if self.study.has_paper() => "base",
            _ => model.rows.iter().find_map(|r| r.paper.as_deref())?,
        };
        self.paper.cell(label, column)
    }

    /// Whether the columns of a span correspond to all of the paper's, so that averages are comparable.
    fn complete(&self, span: Span) -> bool {
        let ours: Vec<Option<&str>> =
            self.study.places(span).iter().map(|&c| self.study.columns()[c].paper.as_deref()).collect();
        let theirs = self.paper.columns(span);
        ours.len() == theirs.len() && theirs.iter().all(|column| ours.contains(&Some(column)))
    }

    fn gain_cells(&self, last: &Model<'r>, span: Span) -> Vec<Cell> {
        self.study.places(span).iter().map(|&c| Cell::new(self.study.gain(last, c), Format::Percent)).collect()
    }

    fn gains(&self, last: &Model<'r>, span: Span, number: usize) -> Row {
        let average = self.study.average_gain(last, span, GainOf::paper(span));
        let cells = self.with_average(self.gain_cells(last, span), span, Cell::new(average, Format::Percent));
        Row {
            name: "gain base".to_owned(),
            cells: self.beside_under(cells, span, number, "gain base", last),
            summary: true,
        }
    }

    fn bwt(&self, last: &Model<'r>, span: Span, number: usize) -> Row {
        let cells = self.study.places(span).iter().map(|&c| self.bwt_cell(last, c)).collect();
        let average = self.study.of_matrix(last, |m| m.mean_of(ScoreMatrix::relative_bwt));
        let cells = self.with_average(cells, span, Cell::new(average, Format::Percent));
        Row { name: "BWT".to_owned(), cells: self.beside_under(cells, span, number, "BWT", last), summary: true }
    }

    fn bwt_cell(&self, last: &Model<'r>, column: usize) -> Cell {
        Cell::new(self.study.of_matrix(last, |m| m.relative_bwt(column)), Format::Percent)
    }

    /// Adds the paper's numbers in the rows below its tables, if the sequence corresponds to the paper's last round.
    fn beside_under(&self, cells: Vec<Cell>, span: Span, number: usize, row: &str, last: &Model<'r>) -> Vec<Cell> {
        if !last.rows.iter().any(|r| r.paper.is_some()) {
            return cells;
        }
        let names = self.study.places(span).into_iter().map(|c| self.study.columns()[c].paper.as_deref());
        let average = if self.complete(span) { Some("AVE") } else { None };
        let names = self.with_average(names.collect(), span, average);
        let printed = |name: Option<&str>| self.paper.under(number, row, name?);
        let cells = cells.into_iter().zip(names);
        cells.map(|(c, name)| c.beside(printed(name).map(|value| Printed { value, swapped: false }))).collect()
    }

    /// Returns a method's name in the overview and next to other methods.
    fn name(&self, model: &Model) -> String {
        let rounds = self.study.results.rounds.len();
        match (model.kind, model.round, model.members) {
            (RowKind::Base, ..) => "base".to_owned(),
            (RowKind::Sequence, Some(round), _) if round < rounds => {
                format!("{} (round {round} of {rounds})", model.method)
            }
            (RowKind::Merge | RowKind::MixtureOfExperts, _, Some(members)) if members < rounds => {
                format!("{} ({members} of {rounds})", model.method)
            }
            _ => model.method.to_owned(),
        }
    }

    fn round(&self, round: Option<usize>) -> &str {
        round.and_then(|r| self.study.results.rounds.get(r - 1)).map_or("", String::as_str)
    }

    fn order(&self) -> String {
        self.study.results.rounds.join(", ")
    }

    fn seeds(&self, model: &Model) -> String {
        let main = self.study.models.iter().filter(|m| m.main).map(|m| m.rows.len()).max();
        match main.unwrap_or(0).max(if model.main { model.rows.len() } else { 0 }) {
            0 | 1 => "One seed; in parentheses the standard error over documents.".to_owned(),
            n => format!("Means over {n} seeds ± their sample standard deviation."),
        }
    }

    fn beside(&self) -> String {
        if self.study.has_paper() {
            format!(" Below ours the paper's number ({MODEL}) and Δ, ours minus the paper's, where the paper has one.")
        } else {
            String::new()
        }
    }
}

/// Names rounds as in the paper: `LoRA 1`, `LoRA 1,2`, `LoRA 1-3`.
fn round_name(model: &Model) -> String {
    match model.round.unwrap_or(0) {
        round @ 0..=1 => format!("{} {round}", model.method),
        2 => format!("{} 1,2", model.method),
        round => format!("{} 1-{round}", model.method),
    }
}

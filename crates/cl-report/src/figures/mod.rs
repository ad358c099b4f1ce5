//! The figures of a study: the paper's ten, then additional ones.

mod bars;
pub(crate) mod heat;
mod legend;
mod lines;
mod scatter;

use crate::format::Format;
use crate::paper::{MODEL, Paper};
use crate::results::{Routing, RowKind, TaskRouting};
use crate::section::{Section, source};
use crate::study::{GainOf, Model, Span, Study, Value};
use crate::svg::Canvas;

use bars::{Bar, Bars, Group, Panel};
use heat::{Grid, Heat, HeatCell};
use lines::{Line, LinePanel, Lines};
use scatter::{Point, Scatter};

/// A figure of the report.
pub(crate) struct Figure {
    /// Name in links and file names, such as `figure-1`.
    pub id: String,
    /// `Figure 1`.
    pub label: String,
    pub title: String,
    /// Description: the comparison and how it was computed.
    pub caption: String,
    /// Its sources.
    pub source: String,
    /// The drawing; `None` if no run provides data for it.
    pub chart: Option<Chart>,
}

/// The content of a figure.
pub(crate) enum Chart {
    Bars(Bars),
    Heat(Heat),
    Lines(Lines),
    Scatter(Scatter),
}

/// Width of figures on a desktop, and in files.
pub(crate) const WIDE: f64 = 760.0;
/// Width of figures on a phone.
pub(crate) const NARROW: f64 = 340.0;

impl Chart {
    pub fn draw(&self, wide: f64) -> Canvas {
        match self {
            Chart::Bars(chart) => chart.draw(wide),
            Chart::Heat(chart) => chart.draw(wide),
            Chart::Lines(chart) => chart.draw(wide),
            Chart::Scatter(chart) => chart.draw(wide),
        }
    }
}

/// Returns all figures with their sections, in order.
pub(crate) fn all(study: &Study, paper: &Paper) -> Vec<(Section, Figure)> {
    let builder = Builder { study, paper };
    let papers = [
        (Section::OneRound, builder.one_round_new()),
        (Section::OneRound, builder.one_round_old()),
        (Section::Sequence, builder.sequence_old()),
        (Section::Sequence, builder.sequence_new()),
        (Section::Sequence, builder.acquired()),
        (Section::Sequence, builder.transfer()),
        (Section::SemiCooperative, builder.semi_cooperative()),
        (Section::FullyCooperative, builder.fully_cooperative()),
        (Section::SemiCooperative, builder.gains(Span::New)),
        (Section::SemiCooperative, builder.gains(Span::Old)),
    ];
    let beyond = [
        (Section::Overview, builder.trade_off()),
        (Section::Beyond, builder.curves()),
        (Section::Beyond, builder.matrices()),
        (Section::Beyond, builder.cost()),
        (Section::SemiCooperative, builder.routing()),
    ];
    // The paper's figures are shown without data only in the paper's study; additional figures are never shown without
    // data.
    let papers = papers.into_iter().filter(|(_, f)| study.has_paper() || f.chart.is_some());
    let mut figures: Vec<(Section, Figure)> =
        papers.chain(beyond.into_iter().filter(|(_, f)| f.chart.is_some())).collect();
    for (place, (_, figure)) in figures.iter_mut().enumerate() {
        figure.label = format!("Figure {}", place + 1);
        figure.id = format!("figure-{}", place + 1);
    }
    figures
}

struct Builder<'s, 'r> {
    study: &'s Study<'r>,
    paper: &'s Paper,
}

/// Time and size of a method.
type Costs = (Option<Value>, Option<Value>);

/// A method in a figure: its displayed name and its model.
type Named<'m, 'r> = (String, &'m Model<'r>);

impl<'r> Builder<'_, 'r> {
    /// Figure 1: scores after one round.
    fn one_round_new(&self) -> Figure {
        let study = self.study;
        let taught = self.taught();
        let methods = study.one_round_methods();
        let group = |&c: &usize| {
            let round = study.columns()[c].round.unwrap_or(0);
            let base = study.base().map(|b| self.bar("base", RowKind::Base, study.score(b, c), self.printed(b, c)));
            let one = methods.iter().filter_map(|m| {
                let model = study.one_round(m, round)?;
                Some(self.bar(m, RowKind::OneRound, study.score(model, c), self.printed(model, c)))
            });
            self.group(c, base.into_iter().chain(one).collect())
        };
        let mut groups: Vec<Group> = if methods.is_empty() { Vec::new() } else { taught.iter().map(group).collect() };
        groups.extend(self.averages(&groups));
        let models = self.one_rounds();
        self.bars(
            "One round: new tasks",
            "Score on each task of a model that learned this task alone, starting from the base model; AVE: mean of the tasks.",
            Format::Score(4),
            groups,
            &models,
        )
    }

    /// Figure 2: old knowledge after one round, averaged over the rounds.
    fn one_round_old(&self) -> Figure {
        let study = self.study;
        let methods = study.one_round_methods();
        let group = |&c: &usize| {
            let base = study.base().map(|b| self.bar("base", RowKind::Base, study.score(b, c), self.printed(b, c)));
            let one = methods.iter().map(|m| self.bar(m, RowKind::OneRound, self.mean_over_rounds(m, c), None));
            self.group(c, base.into_iter().chain(one).collect())
        };
        let old = study.places(Span::Old);
        let mut groups: Vec<Group> = if methods.is_empty() { Vec::new() } else { old.iter().map(group).collect() };
        groups.extend(self.averages(&groups));
        self.bars(
            "One round: old knowledge",
            "Score on each test of old knowledge, averaged over the models that learned one task each; AVE: mean of the tests.",
            Format::Score(4),
            groups,
            &self.one_rounds(),
        )
    }

    /// Figure 3: old knowledge after the last round.
    fn sequence_old(&self) -> Figure {
        self.final_scores(
            Span::Old,
            "Sequences: old knowledge after the last round",
            "Score on each test of old knowledge of the base model and after the last round; AVE: mean of the tests.",
            self.named(self.study.plain_sequences()),
            false,
        )
    }

    /// Figure 4: new tasks after the last round, compared with one round alone.
    fn sequence_new(&self) -> Figure {
        self.final_scores(
            Span::New,
            "Sequences: new tasks after the last round",
            "Score on each task of the base model and after the last round, beside models that learned this task alone (one round), \
             which nothing later disturbs; AVE: mean of the tasks.",
            self.named(self.study.plain_sequences()),
            true,
        )
    }

    fn final_scores(&self, span: Span, title: &str, caption: &str, models: Vec<Named<'_, 'r>>, alone: bool) -> Figure {
        let study = self.study;
        let group = |&c: &usize| {
            let mut bars: Vec<Bar> = study
                .base()
                .map(|b| self.bar("base", RowKind::Base, study.score(b, c), self.printed(b, c)))
                .into_iter()
                .collect();
            bars.extend(models.iter().map(|(name, m)| self.bar(name, m.kind, study.score(m, c), self.printed(m, c))));
            if let Some(round) = study.columns()[c].round.filter(|_| alone) {
                for method in study.one_round_methods() {
                    let value = study.one_round(method, round).and_then(|m| study.score(m, c));
                    let mut bar = self.bar(&format!("one-round {method}"), RowKind::OneRound, value, None);
                    bar.colour = if method.eq_ignore_ascii_case("lora") { 6 } else { 5 };
                    bars.push(bar);
                }
            }
            self.group(c, bars)
        };
        let mut groups: Vec<Group> =
            if models.is_empty() { Vec::new() } else { study.places(span).iter().map(group).collect() };
        groups.extend(self.averages(&groups));
        let mut shown: Vec<&Model> = models.iter().map(|(_, m)| *m).collect();
        if alone {
            shown.extend(self.one_rounds());
        }
        self.bars(title, caption, Format::Score(4), groups, &shown)
    }

    /// Figure 5: scores right after each task's own round.
    fn acquired(&self) -> Figure {
        let study = self.study;
        let models = self.named(study.orthogonal_sequences());
        let group = |&c: &usize| {
            let bars = models.iter().map(|(name, m)| {
                let own = study.rounds_of(m).into_iter().find(|m| m.round == study.columns()[c].round);
                self.bar(name, m.kind, study.acquired(m, c), own.and_then(|own| self.printed(own, c)))
            });
            self.group(c, bars.collect())
        };
        let mut groups: Vec<Group> =
            if models.is_empty() { Vec::new() } else { self.taught().iter().map(group).collect() };
        groups.extend(self.averages(&groups));
        self.bars(
            "Acquisition: each task right after its own round",
            "Score on each task right after the round that trains on it, before any later round; AVE: mean of the tasks.",
            Format::Score(4),
            groups,
            &models.iter().map(|(_, m)| *m).collect::<Vec<_>>(),
        )
    }

    /// Figure 6: backward transfer.
    fn transfer(&self) -> Figure {
        let study = self.study;
        let models = self.named(study.orthogonal_sequences());
        let bwt = |m: &Model<'r>, c: usize| study.of_matrix(m, |matrix| matrix.relative_bwt(c));
        let paper = |m: &Model<'r>, c: usize| {
            let table = match m.method.to_lowercase().as_str() {
                "lora" => 4,
                "fft" => 3,
                _ => return None,
            };
            m.rows.iter().find(|r| r.paper.is_some())?;
            self.paper.under(table, "BWT", study.columns()[c].paper.as_deref()?)
        };
        let earlier = |c: &&usize| study.columns()[**c].round.is_some_and(|r| r < study.results.rounds.len());
        let group = |&c: &usize| {
            let bars = models.iter().map(|(name, m)| self.bar(name, m.kind, bwt(m, c), paper(m, c)));
            self.group(c, bars.collect())
        };
        let taught = self.taught();
        let mut groups: Vec<Group> =
            if models.is_empty() { Vec::new() } else { taught.iter().filter(earlier).map(group).collect() };
        groups.iter_mut().for_each(|g| g.chance = None);
        groups.extend(self.averages(&groups));
        self.bars(
            "Retention: backward transfer after the last round",
            "BWT of each task as the paper defines it: final score over the score right after the task’s own round, minus one; \
             the last round’s tasks have none. AVE: mean of the tasks.",
            Format::Percent,
            groups,
            &models.iter().map(|(_, m)| *m).collect::<Vec<_>>(),
        )
    }

    /// Figure 7: average gains in the semi-cooperative setting.
    fn semi_cooperative(&self) -> Figure {
        self.average_gains("Semi-cooperative setting: average gain over the base", self.study.semi_cooperative())
    }

    /// Figure 8: average gains in the fully cooperative setting.
    fn fully_cooperative(&self) -> Figure {
        self.average_gains("Fully cooperative setting: average gain over the base", self.study.fully_cooperative())
    }

    fn average_gains(&self, title: &str, models: Vec<&Model<'r>>) -> Figure {
        let panel = |span: Span, title: &str| {
            let group = |model: &&Model<'r>| {
                let gain = self.study.average_gain(model, span, GainOf::paper(span));
                let bar = self.bar(model.method, model.kind, gain, self.printed_gain(model, span));
                Group { label: model.method.to_owned(), bars: vec![bar], chance: None }
            };
            Panel {
                title: title.to_owned(),
                format: Format::Percent,
                groups: models.iter().map(group).collect(),
                seeds: self.study.has_seeds(),
            }
        };
        let panels = [(Span::Old, "Old knowledge"), (Span::New, "New tasks")];
        let panels = panels.into_iter().filter(|(span, _)| !self.study.places(*span).is_empty());
        let panels: Vec<Panel> = panels.map(|(span, title)| panel(span, title)).collect();
        let caption = "Gain over the base after the last step: of old knowledge the mean of the tests’ relative gains, of new tasks the \
             relative gain of their mean score, as the paper computes them. The panels have scales of their own.";
        let chart = (!models.is_empty() && !panels.is_empty()).then_some(Chart::Bars(Bars { panels }));
        self.figure(title, caption, chart, &models)
    }

    /// Figures 9 and 10: gain of each task in the semi-cooperative setting.
    fn gains(&self, span: Span) -> Figure {
        let models = self.study.semi_cooperative();
        let places = self.study.places(span);
        let what = if span == Span::Old { "old knowledge" } else { "new tasks" };
        let format = Format::Percent;
        // The colour scale is limited, so that a single task that starts near zero does not dominate it.
        let full = if span == Span::Old { 0.25 } else { 1.0 };
        let row = |model: &&Model<'r>| {
            let average = self.study.average_gain(model, span, GainOf::paper(span));
            let gains = places.iter().map(|&c| (self.study.columns()[c].name.clone(), self.study.gain(model, c)));
            let cells = gains.chain([("AVE".to_owned(), average)]).map(|(name, gain)| {
                let Some(gain) = gain else { return HeatCell::default() };
                let details = crate::table::Cell::new(Some(gain.clone()), format).details();
                let text = format!("{:+.0}", 100.0 * gain.mean).replace('-', "−").replace("+0", "0").replace("−0", "0");
                let tip = format!("{}, {name}: {details}", model.method);
                HeatCell { text, tone: Some(gain.mean / full), tip, framed: name == "AVE" }
            });
            (model.method.to_owned(), cells.collect())
        };
        let mut columns: Vec<String> = places.iter().map(|&c| self.study.columns()[c].name.clone()).collect();
        columns.push("AVE".to_owned());
        let grid = Grid { title: String::new(), columns, rows: models.iter().map(row).collect() };
        let legend = format!("gain over the base in percent, from −{0:.0} to +{0:.0}", 100.0 * full);
        let chart = (!models.is_empty() && !places.is_empty()).then_some(Chart::Heat(Heat {
            grids: vec![grid],
            legend,
            lowest: -1.0,
        }));
        let average = if span == Span::Old { "mean of the gains" } else { "gain of the mean score" };
        self.figure(
            &format!("Semi-cooperative setting: gain of each task, {what}"),
            &format!(
                "Relative gain over the base after the last step, in percent; AVE: {average}. Colours are clipped at ±{:.0}%, the \
                 numbers are not.",
                100.0 * full
            ),
            chart,
            &models,
        )
    }

    /// Acquisition versus retention.
    fn trade_off(&self) -> Figure {
        let study = self.study;
        let models: Vec<&Model<'r>> = study.base().into_iter().chain(study.finals()).collect();
        let point = |model: &&Model<'r>| {
            let name = if model.kind == RowKind::Base { "base" } else { model.method };
            Some(Point {
                name: name.to_owned(),
                colour: study.colour(model.kind, model.method),
                new: study.average(model, Span::New)?,
                old: study.average(model, Span::Old)?,
            })
        };
        let points: Vec<Point> = models.iter().filter_map(point).collect();
        let (across, up) =
            ("AVnew: mean score on new tasks".to_owned(), "AVold: mean score on old knowledge".to_owned());
        let chart =
            (points.len() >= 2).then_some(Chart::Scatter(Scatter { points, across, up, seeds: study.has_seeds() }));
        self.figure(
            "Acquisition against retention",
            "Every method after its last step. The dashed line is the Pareto front: methods on it (larger, bold) are beaten by no other \
             on both axes. Bars are the standard deviation over seeds, or the standard error with one seed.",
            chart,
            &models,
        )
    }

    /// Score of each task over the rounds.
    fn curves(&self) -> Figure {
        let study = self.study;
        let models = study.finals_of(RowKind::Sequence);
        let line = |model: &&Model<'r>, c: usize| {
            let rounds = study.rounds_of(model);
            let base = study.base().and_then(|b| study.score(b, c));
            let later = (1..=model.round.unwrap_or(0))
                .map(|t| rounds.iter().find(|m| m.round == Some(t)).and_then(|m| study.score(m, c)));
            let values = std::iter::once(base).chain(later).collect();
            Line { name: model.method.to_owned(), colour: study.colour(model.kind, model.method), values }
        };
        let places = [Span::New, Span::Old].map(|span| study.places(span)).concat();
        let panel = |&c: &usize| {
            let column = &study.columns()[c];
            let lines = models.iter().map(|m| line(m, c)).collect();
            LinePanel { title: column.name.clone(), lines, own: column.round, chance: column.chance }
        };
        let panels: Vec<LinePanel> = places.iter().map(panel).collect();
        let steps = std::iter::once("base".to_owned());
        let steps = steps.chain(study.results.rounds.iter().enumerate().map(|(i, r)| format!("round {} ({r})", i + 1)));
        let chart = (!models.is_empty()).then_some(Chart::Lines(Lines { panels, steps: steps.collect() }));
        self.figure(
            "Learning and forgetting over the rounds",
            "Score on each task after each round; 0 is the base model, new tasks come first. Areas are the standard deviation over seeds. \
             The panels have scales of their own.",
            chart,
            &models,
        )
    }

    /// Score matrices of all sequences.
    fn matrices(&self) -> Figure {
        let study = self.study;
        let models = study.finals_of(RowKind::Sequence);
        let grid = |model: &&Model<'r>| {
            let rounds = study.rounds_of(model);
            let at: Vec<Option<&Model<'r>>> = std::iter::once(study.base())
                .chain((1..=model.round.unwrap_or(0)).map(|t| rounds.iter().find(|m| m.round == Some(t)).copied()))
                .collect();
            let row = |&c: &usize| {
                let column = &study.columns()[c];
                let before = study.base().and_then(|b| study.score(b, c)).map(|v| v.mean);
                let cells = at.iter().enumerate().map(|(t, m)| {
                    let Some(value) = m.and_then(|m| study.score(m, c)) else { return HeatCell::default() };
                    let tone = before.map_or(0.0, |b| (value.mean - b) / 0.4);
                    let details = crate::table::Cell::new(Some(value.clone()), Format::Score(4)).details();
                    let tip = format!("{}, {}, after round {t}: {details}", model.method, column.name);
                    let text = format!("{:.2}", value.mean).trim_start_matches('0').to_owned();
                    HeatCell { text, tone: Some(tone), tip, framed: column.round == Some(t) }
                });
                (column.name.clone(), cells.collect())
            };
            let places = [Span::New, Span::Old].map(|span| study.places(span)).concat();
            let columns = (0..at.len()).map(|t| t.to_string()).collect();
            Grid { title: model.method.to_owned(), columns, rows: places.iter().map(row).collect() }
        };
        let grids: Vec<Grid> = models.iter().map(grid).collect();
        let legend = "score minus the base’s, from −0.4 to +0.4".to_owned();
        let chart = (!models.is_empty()).then_some(Chart::Heat(Heat { grids, legend, lowest: -1.0 }));
        self.figure(
            "Score matrices",
            "Scores of each sequence by task (rows) and round (columns; 0 is the base model). Colour: difference from the base. A frame marks the \
             round that trains on the task.",
            chart,
            &models,
        )
    }

    /// Time and size.
    fn cost(&self) -> Figure {
        let study = self.study;
        let models = study.finals();
        let costs: Vec<Costs> = models.iter().map(|m| study.cost(m)).collect();
        let panel = |title: &str, format: Format, of: fn(&Costs) -> Option<Value>| {
            let group = |(model, cost): (&&Model<'r>, _)| {
                let bar = self.bar(model.method, model.kind, of(cost), None);
                Group { label: model.method.to_owned(), bars: vec![bar], chance: None }
            };
            let groups: Vec<Group> =
                models.iter().zip(&costs).map(group).filter(|g| g.bars[0].value.is_some()).collect();
            (!groups.is_empty()).then_some(Panel { title: title.to_owned(), format, groups, seeds: study.has_seeds() })
        };
        let panels = [panel("Time", Format::Seconds, |c| c.0.clone()), panel("Stored", Format::Bytes, |c| c.1.clone())];
        let panels: Vec<Panel> = panels.into_iter().flatten().collect();
        let chart = (!panels.is_empty()).then_some(Chart::Bars(Bars { panels }));
        self.figure(
            "Cost",
            "Time and stored bytes of a method’s own steps: of a sequence all its rounds together, of a merge or mixture the merging \
             alone, without the models it is made of.",
            chart,
            &models,
        )
    }

    /// Routing statistics of mixtures, for the first seed.
    fn routing(&self) -> Figure {
        let study = self.study;
        let mixtures: Vec<&Model<'r>> =
            study.models.iter().filter(|m| m.kind == RowKind::MixtureOfExperts && m.main).collect();
        let routed = |m: &&Model<'r>| Some((m.method, m.members, m.rows.first()?.routing.as_ref()?));
        let rounds = &study.results.rounds;
        let number =
            |name: &String| rounds.iter().position(|r| r == name).map_or(name.clone(), |r| (r + 1).to_string());
        let grid = |(method, members, routing): (&str, Option<usize>, &'r Routing)| {
            let row = |task: &'r TaskRouting| {
                let cells = routing.experts.iter().zip(&task.shares).map(|(expert, &share)| HeatCell {
                    text: format!("{:.0}", 100.0 * share),
                    tone: Some(share.clamp(0.0, 1.0)),
                    tip: format!("{method}, data of {}, expert of {expert}: {:.1} %", task.task, 100.0 * share),
                    framed: task.task == *expert,
                });
                (task.task.clone(), cells.collect())
            };
            let title = match members.filter(|&m| m < rounds.len()) {
                Some(members) => format!("{method}, {members} of {}", rounds.len()),
                None => method.to_owned(),
            };
            Grid {
                title,
                columns: routing.experts.iter().map(number).collect(),
                rows: routing.tasks.iter().map(row).collect(),
            }
        };
        let grids: Vec<Grid> = mixtures.iter().filter_map(routed).map(grid).collect();
        let legend = "share of a token’s gates, from 0 to 100 %".to_owned();
        let chart = (!grids.is_empty()).then_some(Chart::Heat(Heat { grids, legend, lowest: 0.0 }));
        self.figure(
            "Routing",
            "Share of a token’s gates in percent that each expert gets (columns, by the round that it learned), by the round whose data is              read (rows): mean over tokens and all routers, first seed. A frame marks a round’s own expert. Trained routers have seen              the data of all rounds, the others none but what their experts learned.",
            chart,
            &mixtures,
        )
    }

    fn bar(&self, name: &str, kind: RowKind, value: Option<Value>, paper: Option<f64>) -> Bar {
        Bar { name: name.to_owned(), value, paper, colour: self.study.colour(kind, name) }
    }

    fn group(&self, column: usize, bars: Vec<Bar>) -> Group {
        let column = &self.study.columns()[column];
        Group { label: column.name.clone(), bars, chance: column.chance }
    }

    /// Returns a group with the means over all groups, for the bars that all groups have.
    fn averages(&self, groups: &[Group]) -> Option<Group> {
        let first = groups.first()?;
        let average = |bar: &Bar| {
            let of: Option<Vec<&Bar>> = groups.iter().map(|g| g.bars.iter().find(|b| b.name == bar.name)).collect();
            let of = of?;
            let values: Option<Vec<&Value>> = of.iter().map(|b| b.value.as_ref()).collect();
            let papers: Option<Vec<f64>> = of.iter().map(|b| b.paper).collect();
            let paper = papers.and_then(|p| crate::study::mean(&p));
            Some(Bar { value: mean_value(&values?), paper, ..bar.clone() })
        };
        let bars: Vec<Bar> = first.bars.iter().filter_map(average).collect();
        (groups.len() > 1 && !bars.is_empty()).then_some(Group { label: "AVE".to_owned(), bars, chance: None })
    }

    /// Returns the score of a one-round method on a column, averaged over the rounds.
    fn mean_over_rounds(&self, method: &str, column: usize) -> Option<Value> {
        let rounds = 1..=self.study.results.rounds.len();
        let models: Vec<&Model> = rounds.filter_map(|r| self.study.one_round(method, r)).collect();
        let values: Option<Vec<Value>> = models.iter().map(|m| self.study.score(m, column)).collect();
        mean_value(&values?.iter().collect::<Vec<_>>())
    }

    fn one_rounds(&self) -> Vec<&Model<'r>> {
        self.study.models.iter().filter(|m| m.main && m.kind == RowKind::OneRound).collect()
    }

    /// Returns the columns of new knowledge that a round trains on.
    fn taught(&self) -> Vec<usize> {
        let places = self.study.places(Span::New).into_iter();
        places.filter(|&c| self.study.columns()[c].round.is_some()).collect()
    }

    fn named<'m>(&self, models: Vec<&'m Model<'r>>) -> Vec<Named<'m, 'r>> {
        models.into_iter().map(|m| (m.method.to_owned(), m)).collect()
    }

    fn printed(&self, model: &Model, column: usize) -> Option<f64> {
        let label = match model.kind {
            RowKind::Base if self.study.has_paper() => "base",
            _ => model.rows.iter().find_map(|r| r.paper.as_deref())?,
        };
        Some(self.paper.cell(label, self.study.columns()[column].paper.as_deref()?)?.value)
    }

    /// Returns the paper's average gain, recomputed from the cells of its tables, for a model that corresponds to one
    /// of its rows.
    fn printed_gain(&self, model: &Model, span: Span) -> Option<f64> {
        let label = model.rows.iter().find_map(|r| r.paper.as_deref())?;
        let ours = self.study.places(span).len();
        let columns = self.paper.columns(span);
        if ours != columns.len() {
            return None;
        }
        let cells =
            |label: &str| columns.iter().map(|c| Some(self.paper.cell(label, c)?.value)).collect::<Option<Vec<f64>>>();
        let (before, after) = (cells("base")?, cells(label)?);
        match GainOf::paper(span) {
            GainOf::Columns => cl_eval::mean_of_percentages(&before, &after),
            GainOf::Means => cl_eval::ratio_of_means(&before, &after),
        }
    }

    fn bars(&self, title: &str, caption: &str, format: Format, groups: Vec<Group>, models: &[&Model<'r>]) -> Figure {
        let some = groups.iter().any(|g| g.bars.iter().any(|b| b.value.is_some()));
        let panels = vec![Panel { title: String::new(), format, groups, seeds: self.study.has_seeds() }];
        self.figure(title, caption, some.then_some(Chart::Bars(Bars { panels })), models)
    }

    fn figure(&self, title: &str, caption: &str, chart: Option<Chart>, models: &[&Model<'r>]) -> Figure {
        let beside = if self.study.has_paper() {
            format!(" Diamonds: the paper’s numbers ({MODEL}), where its tables have them.")
        } else {
            String::new()
        };
        let bars = matches!(chart, Some(Chart::Bars(_)));
        Figure {
            id: String::new(),
            label: String::new(),
            title: title.to_owned(),
            caption: format!("{caption}{}", if bars { beside } else { String::new() }),
            source: source(models.iter().copied()),
            chart,
        }
    }
}

/// Returns the mean of values for each seed, over the seeds that all of them have.
fn mean_value(values: &[&Value]) -> Option<Value> {
    let first = values.first()?;
    let of_seed = |seed: u64| {
        let all: Option<Vec<f64>> =
            values.iter().map(|v| v.by_seed.iter().find(|(s, _)| *s == seed).map(|(_, v)| *v)).collect();
        Some((seed, crate::study::mean(&all?)?))
    };
    let by_seed: Vec<(u64, f64)> = first.by_seed.iter().filter_map(|(seed, _)| of_seed(*seed)).collect();
    let mean = crate::study::mean(&by_seed.iter().map(|(_, v)| *v).collect::<Vec<f64>>())?;
    let squares: Option<Vec<f64>> = values.iter().map(|v| v.standard_error.map(|e| e * e)).collect();
    let standard_error = squares.map(|s| s.iter().sum::<f64>().sqrt() / values.len() as f64);
    Some(Value { mean, by_seed, standard_error })
}

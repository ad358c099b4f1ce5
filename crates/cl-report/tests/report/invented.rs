//! A synthetic study, with every kind of model, three seeds, missing cells and hostile names.

use cl_eval::Group;
use cl_report::{Column, ResultRow, Routing, RowKind, StudyResults, TaskRouting};

pub const HOSTILE: &str = "<script>alert(1)</script> & \"DARE\" | \\%_$";

const ROUNDS: [&str; 7] = ["cstance", "fomc", "meeting", "py150", "science", "20minuten", "math"];
const OLD: [(&str, &str, f64, f64); 7] = [
    ("mmlu", "mmlu", 0.62, 0.25),
    ("arc_challenge", "arc_c", 0.53, 0.25),
    ("commonsense_qa", "comqa", 0.69, 0.2),
    ("hellaswag", "hella", 0.79, 0.25),
    ("openbookqa", "opnbk", 0.45, 0.25),
    ("piqa", "piqa", 0.81, 0.5),
    ("winogrande", "wino", 0.73, 0.5),
];
/// Name, column in the paper, round, base score, and score once learned.
const NEW: [(&str, &str, usize, f64, f64); 8] = [
    ("cstance", "cstan", 1, 0.22, 0.53),
    ("fomc", "fomc", 2, 0.26, 0.71),
    ("meeting", "meet", 3, 0.17, 0.38),
    ("py150", "py150", 4, 0.045, 0.54),
    ("science", "sci", 5, 0.73, 0.91),
    ("20minuten", "20min", 6, 0.35, 0.41),
    ("gsm8k", "gsm8k", 7, 0.50, 0.71),
    ("gsm8k_cot", "gsmcot", 7, 0.55, 0.71),
];

/// Behaviour of a method: the fraction of a task that it learns, the fraction of that forgotten per round, and the loss
/// of old knowledge per round.
#[derive(Clone, Copy)]
struct Fate {
    learns: f64,
    forgets: f64,
    loses: f64,
}

struct Maker {
    results: StudyResults,
    noise: u64,
}

pub fn study() -> StudyResults {
    let mut maker = Maker { results: blank(), noise: 9 };
    let zero = Fate { learns: 0.0, forgets: 0.0, loses: 0.0 };
    for seed in 1..=3 {
        if seed == 1 {
            maker.push(seed, "base", RowKind::Base, None, zero, "base", 0.0);
        }
        let [lora, fft] = [fate(0.95, 0.05, 0.002), fate(1.0, 0.09, 0.012)];
        for (name, fate) in [("LoRA", lora), ("FFT", fft)] {
            for round in 1..=7 {
                maker.push(seed, name, RowKind::OneRound, Some(round), fate, "", 600.0);
            }
        }
        let sequences = [
            ("LoRA", lora),
            ("FFT", fft),
            ("o-LoRA-l1(0.5)", fate(0.88, 0.03, 0.002)),
            ("o-LoRA-l1(5)", fate(0.7, 0.01, 0.001)),
            ("LoRA-Rep", fate(0.97, 0.01, 0.002)),
            ("FFT-Rep", fate(1.0, 0.015, 0.015)),
        ];
        for (name, fate) in sequences {
            for round in 1..=7 {
                let paper = if ["LoRA", "FFT"].contains(&name) {
                    format!("{name} {}", ["1", "1,2", "1-3", "1-4", "1-5", "1-6", "1-7"][round - 1])
                } else if round == 7 && name.ends_with("Rep") {
                    name.to_owned()
                } else {
                    String::new()
                };
                maker.push(seed, name, RowKind::Sequence, Some(round), fate, &paper, 900.0);
            }
        }
        maker.push(seed, "Joint-LoRA", RowKind::Joint, None, fate(0.93, 0.0, 0.001), "Joint-LoRA", 5_000.0);
        maker.push(seed, "Joint-FFT", RowKind::Joint, None, fate(0.98, 0.0, 0.005), "Joint-FFT", 9_000.0);
        for members in 2..=7 {
            let done = members as f64 / 7.0;
            maker.combined(seed, "LoRA merge", RowKind::Merge, members, fate(0.4 * done, 0.0, 0.001));
            maker.combined(seed, "FFT merge", RowKind::Merge, members, fate(0.45 * done, 0.0, 0.004));
        }
        maker.combined(seed, "TIES", RowKind::Merge, 7, fate(0.15, 0.0, 0.003));
        maker.combined(seed, HOSTILE, RowKind::Merge, 7, fate(0.1, 0.0, 0.003));
        maker.combined(seed, "LoRA MoE", RowKind::MixtureOfExperts, 7, fate(0.72, 0.0, 0.002));
        maker.combined(seed, "FFT MoE", RowKind::MixtureOfExperts, 4, fate(0.68, 0.0, 0.003));
        for (name, learns) in [("DARE with rescale", 0.32), ("DARE without rescale", 0.12)] {
            maker.combined(seed, name, RowKind::Merge, 7, fate(learns, 0.0, 0.003));
            let row = maker.results.rows.last_mut().unwrap();
            (row.main, row.question) = (false, Some("DARE with and without rescale".to_owned()));
        }
    }
    let rows = &mut maker.results.rows;
    // A cell that one seed lacks, one that all seeds lack, and one that is not a number.
    rows.iter_mut().find(|r| r.method == "Joint-FFT" && r.seed == 2).unwrap().scores[3] = None;
    rows.iter_mut().filter(|r| r.method == "FFT MoE").for_each(|r| r.scores[7] = None);
    rows.iter_mut().find(|r| r.method == "TIES").unwrap().scores[9] = Some(f64::NAN);
    maker.results
}

fn fate(learns: f64, forgets: f64, loses: f64) -> Fate {
    Fate { learns, forgets, loses }
}

fn blank() -> StudyResults {
    let old = OLD.iter().map(|(name, paper, _, chance)| Column {
        name: (*name).to_owned(),
        group: Group::Old,
        metric: "acc".to_owned(),
        chance: Some(*chance),
        round: None,
        paper: Some((*paper).to_owned()),
    });
    let new = NEW.iter().map(|(name, paper, round, ..)| Column {
        name: (*name).to_owned(),
        group: Group::New,
        metric: "first_char".to_owned(),
        chance: (*round <= 2).then_some(1.0 / 3.0),
        round: Some(*round),
        paper: Some((*paper).to_owned()),
    });
    StudyResults {
        name: "Seven rounds <b>& more</b>".to_owned(),
        description: "An invented study: every number comes from a formula, none from a model.".to_owned(),
        model: "Meta-Llama-3-8B (invented)".to_owned(),
        seeds: vec![1, 2, 3],
        rounds: ROUNDS.map(str::to_owned).to_vec(),
        columns: old.chain(new).collect(),
        rows: Vec::new(),
        notes: vec!["A note with <i>markup</i>.".to_owned()],
    }
}

impl Maker {
    fn push(
        &mut self,
        seed: u64,
        method: &str,
        kind: RowKind,
        round: Option<usize>,
        fate: Fate,
        paper: &str,
        seconds: f64,
    ) {
        let old = OLD.map(|(.., base, _)| (base, None, base)).map(|(base, round, learned)| (base, round, learned));
        let new = NEW.map(|(_, _, round, base, learned)| (base, Some(round), learned));
        let last = round.unwrap_or(7);
        let scores: Vec<Option<f64>> = old
            .into_iter()
            .chain(new)
            .map(|(base, own, learned)| {
                let noise = if kind == RowKind::Base { 0.0 } else { 0.012 * self.noise() };
                let rounds = if kind == RowKind::OneRound { 2.0 } else { last as f64 };
                let Some(own) = own else { return Some((base - fate.loses * rounds + noise).clamp(0.0, 1.0)) };
                let seen = match kind {
                    RowKind::Base => false,
                    RowKind::OneRound => own == last,
                    _ => own <= last,
                };
                let kept =
                    if kind == RowKind::Sequence { 1.0 - fate.forgets * last.saturating_sub(own) as f64 } else { 1.0 };
                let gained = if seen { (learned - base) * fate.learns * kept } else { 0.0 };
                Some((base + gained + noise).clamp(0.0, 1.0))
            })
            .collect();
        let errors = scores.iter().map(|s| s.map(|s| (s * (1.0 - s) / 500.0).sqrt())).collect();
        let seconds = seconds * (1.0 + 0.05 * self.noise());
        let bytes = if method.contains("FFT") { 16_060_000_000 } else { 84_000_000 };
        self.results.rows.push(ResultRow {
            stage: format!("{method}-{kind:?}-{}-seed{seed}", round.map_or(String::new(), |r| r.to_string())),
            method: method.to_owned(),
            kind,
            seed,
            round,
            members: None,
            main: true,
            question: None,
            paper: (!paper.is_empty()).then(|| paper.to_owned()),
            scores,
            standard_errors: errors,
            seconds: (kind != RowKind::Base).then_some(seconds),
            bytes: (kind != RowKind::Base).then_some(bytes),
            routing: None,
        });
    }

    fn combined(&mut self, seed: u64, method: &str, kind: RowKind, members: usize, fate: Fate) {
        self.push(seed, method, kind, None, fate, "", 40.0);
        let row = self.results.rows.last_mut().unwrap();
        row.members = Some(members);
        if kind == RowKind::MixtureOfExperts {
            let experts: Vec<String> = ROUNDS[ROUNDS.len() - members..].iter().map(|r| (*r).to_owned()).collect();
            // Half of a token's gates go to the round's own expert, and the rest equally to all experts.
            let shares = |task: &str| {
                let own = experts.iter().any(|e| e == task);
                let rest = if own { 0.5 } else { 1.0 } / members as f64;
                experts.iter().map(|e| rest + if e == task { 0.5 } else { 0.0 }).collect()
            };
            let tasks = ROUNDS.iter().map(|task| TaskRouting { task: (*task).to_owned(), shares: shares(task) });
            row.routing = Some(Routing { tasks: tasks.collect(), experts });
        }
        row.stage += &format!("-{members}");
    }

    /// Returns a number between −1 and 1, the same in every run of the test.
    fn noise(&mut self) -> f64 {
        self.noise = self.noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.noise >> 33) as f64 / f64::from(1u32 << 30) - 1.0
    }
}

//! Selection of the methods to compare in tables and figures, and their colours.

use crate::results::RowKind;
use crate::study::{Model, Study};

/// The trained parameters, as far as the name of a method indicates them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    Lora,
    Full,
    Unknown,
}

pub(crate) fn family(method: &str) -> Family {
    let name = method.to_lowercase();
    if name.contains("lora") {
        Family::Lora
    } else if name.contains("fft") || name.contains("full") {
        Family::Full
    } else {
        Family::Unknown
    }
}

/// Whether this is the name of an o-lora method.
pub(crate) fn is_olora(method: &str) -> bool {
    let name = method.to_lowercase();
    name.contains("o-lora") || name.contains("olora")
}

/// Whether this is the name of a sequence with replay.
pub(crate) fn is_replay(method: &str) -> bool {
    let name = method.to_lowercase();
    name.contains("-rep") || name.contains("replay")
}

/// Returns the weight λ in a name such as `o-LoRA-l1(0.5)`.
pub(crate) fn weight(method: &str) -> Option<f64> {
    method.rsplit_once('(')?.1.split_once(')')?.0.trim_start_matches(['λ', '=', ' ']).trim().parse().ok()
}

/// Whether the name indicates a merge of whole task vectors, not of the factors of adapters.
pub(crate) fn is_of_task_vectors(method: &str) -> bool {
    let name = method.to_lowercase();
    ["δ", "delta", "svd", "task vector", "fft"].iter().any(|part| name.contains(part))
}

/// Whether the name indicates training on the data of all rounds, such as that of a mixture's routers.
pub(crate) fn is_trained(method: &str) -> bool {
    method.to_lowercase().ends_with("(trained)")
}

/// Whether this is the name of TIES or DARE.
pub(crate) fn is_ties_or_dare(method: &str) -> bool {
    let name = method.to_lowercase();
    name.contains("ties") || name.contains("dare")
}

impl<'r> Study<'r> {
    /// Returns plain sequences with LoRA and FFT; if a study has none with these names, all sequences.
    pub fn plain_sequences(&self) -> Vec<&Model<'r>> {
        let named: Vec<&Model<'r>> = ["LoRA", "FFT"].iter().filter_map(|name| self.sequence(name)).collect();
        if named.is_empty() { self.finals_of(RowKind::Sequence) } else { named }
    }

    /// Returns LoRA and o-lora; in a study without o-lora, all sequences.
    pub fn orthogonal_sequences(&self) -> Vec<&Model<'r>> {
        let sequences = self.finals_of(RowKind::Sequence);
        let mut orthogonal: Vec<&Model<'r>> = sequences.iter().copied().filter(|m| is_olora(m.method)).collect();
        if orthogonal.is_empty() {
            return sequences;
        }
        orthogonal.splice(0..0, self.sequence("LoRA"));
        orthogonal
    }

    /// Returns the methods that need no earlier data: o-lora, merges, mixtures, and models of unknown origin.
    pub fn semi_cooperative(&self) -> Vec<&Model<'r>> {
        let belongs = |m: &&Model<'r>| match m.kind {
            RowKind::Merge | RowKind::MixtureOfExperts | RowKind::Other => true,
            RowKind::Sequence => is_olora(m.method),
            _ => false,
        };
        self.finals().into_iter().filter(belongs).collect()
    }

    /// Returns the methods of the fully cooperative setting: joint training, sequences, and sequences with replay, LoRA
    /// first.
    pub fn fully_cooperative(&self) -> Vec<&Model<'r>> {
        let rank = |m: &Model| match m.kind {
            RowKind::Joint => Some(0),
            RowKind::Sequence if is_replay(m.method) => Some(2),
            RowKind::Sequence if ["lora", "fft"].contains(&m.method.to_lowercase().as_str()) => Some(1),
            _ => None,
        };
        let mut chosen: Vec<&Model<'r>> = self.finals().into_iter().filter(|m| rank(m).is_some()).collect();
        if !chosen.iter().any(|m| rank(m) != Some(1)) {
            return Vec::new();
        }
        chosen.sort_by_key(|m| (family(m.method), rank(m)));
        chosen
    }

    /// Returns the colour of a method, as an index of the palette; it is the same in all figures.
    pub fn colour(&self, kind: RowKind, method: &str) -> usize {
        let name = method.to_lowercase();
        match (kind, name.as_str()) {
            (RowKind::Base, _) => return 0,
            (RowKind::Sequence | RowKind::OneRound, "lora") => return 1,
            (RowKind::Sequence | RowKind::OneRound, "fft") => return 2,
            _ => {}
        }
        let others: Vec<(RowKind, &str)> =
            self.finals().iter().map(|m| (m.kind, m.method)).filter(|(k, m)| self.free(*k, m)).collect();
        let place = others.iter().position(|o| *o == (kind, method)).unwrap_or(0);
        // 5 and 6 are used for one-round models next to sequences.
        const FREE: [usize; 11] = [3, 4, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        FREE[place % FREE.len()]
    }

    fn free(&self, kind: RowKind, method: &str) -> bool {
        !(kind == RowKind::Sequence && ["lora", "fft"].contains(&method.to_lowercase().as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(weight("o-LoRA-l1(0.5)"), Some(0.5));
        assert_eq!(weight("o-LoRA (λ = 5)"), Some(5.0));
        assert_eq!(weight("LoRA"), None);
        assert_eq!(
            (family("Joint-FFT"), family("LoRA MoE"), family("TIES")),
            (Family::Full, Family::Lora, Family::Unknown)
        );
        assert!(is_olora("o-LoRA(5)") && !is_olora("Joint-LoRA") && is_replay("FFT-Rep") && !is_replay("LoRA"));
    }
}

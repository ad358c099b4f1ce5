//! The words of the tiny study; each is one token.

pub(super) const SUBJECTS: [&str; 40] = [
    "alba", "bero", "cito", "dana", "elmo", "fira", "gino", "hela", "ivor", "juna", "kato", "lira", "mavi", "nilo",
    "orso", "pela", "quin", "rosa", "sami", "tora", "udo", "vera", "wido", "xena", "yara", "zeno", "arno", "bina",
    "cora", "dino", "ezra", "fina", "gala", "hugo", "inka", "jano", "kira", "leto", "mika", "nora",
];
pub(super) const PLACES: [&str; 8] = ["rome", "oslo", "lima", "cairo", "delhi", "kyoto", "paris", "quito"];
pub(super) const COLOURS: [&str; 8] = ["red", "blue", "green", "black", "white", "brown", "grey", "pink"];
pub(super) const TRADES: [&str; 8] = ["baker", "smith", "miller", "tailor", "mason", "fisher", "weaver", "potter"];
pub(super) const LETTERS: [&str; 3] = ["A", "B", "C"];
pub(super) const STANCES: [[&str; 6]; 3] = [
    ["lomi", "sana", "velo", "kemu", "nuri", "tavo"],
    ["grak", "drun", "brak", "zurg", "mord", "krun"],
    ["opli", "ambe", "etti", "uvra", "isco", "andu"],
];
pub(super) const OTHER_NOUNS: [&str; 12] =
    ["pavi", "rolu", "tesk", "wani", "dolp", "figo", "hamu", "jelt", "kosp", "lunt", "mips", "nolf"];
pub(super) const MOODS: [[&str; 6]; 3] = [
    ["glad", "merry", "proud", "calm", "bright", "sunny"],
    ["sad", "gloomy", "angry", "bitter", "dark", "sour"],
    ["plain", "usual", "even", "common", "middling", "flat"],
];
pub(super) const NOUNS: [&str; 12] =
    ["day", "song", "street", "letter", "house", "river", "market", "story", "garden", "winter", "road", "park"];
pub(super) const VERBS: [&str; 8] = ["paint", "close", "plan", "fund", "sell", "mend", "open", "clean"];
pub(super) const FILLERS: [&str; 4] = ["well", "today", "first", "please"];
pub(super) const FUNCTIONS: [&str; 6] = ["load", "save", "join", "send", "sort", "push"];
pub(super) const VARIABLES: [&str; 10] = ["a", "b", "c", "d", "e", "k", "m", "n", "x", "y"];
pub(super) const THINGS: [&str; 12] =
    ["iron", "wood", "stone", "paper", "glass", "wool", "clay", "salt", "lead", "cork", "sand", "wax"];
pub(super) const PROPERTIES: [&str; 2] = ["heavier", "harder"];
/// How much of each property each thing has; the values are arbitrary.
pub(super) const RANKS: [[u8; 12]; 2] =
    [[11, 3, 8, 1, 7, 2, 6, 5, 12, 0, 9, 4], [12, 6, 11, 3, 10, 0, 5, 7, 8, 2, 4, 1]];
pub(super) const HARD_NOUNS: [(&str, &str); 6] = [
    ("monarch", "king"),
    ("physician", "doctor"),
    ("dwelling", "home"),
    ("infant", "baby"),
    ("vessel", "ship"),
    ("canine", "dog"),
];
pub(super) const HARD_VERBS: [(&str, &str); 6] = [
    ("perished", "died"),
    ("departed", "left"),
    ("commenced", "began"),
    ("declined", "fell"),
    ("ascended", "rose"),
    ("slumbered", "slept"),
];
pub(super) const HARD_ADVERBS: [(&str, &str); 4] =
    [("rapidly", "fast"), ("subsequently", "later"), ("silently", "quietly"), ("presently", "now")];
/// Function words and symbols.
const FRAME: [&str; 36] = [
    "<unk>", "<s>", "</s>", "where", "does", "live", "which", "colour", "like", "?", ":", ".", ",", ";", "(", ")", "=",
    "+", "####", "the", "of", "is", "and", "then", "will", "def", "with", "call", "because", "than", "has", "gets",
    "more", "how", "many", "what",
];
/// The words that identify the task in a prompt.
const NAMES: [&str; 9] = ["stance", "tone", "minutes", "code", "science", "simple", "math", "trade", "work"];

/// Returns every word once: the special tokens (unknown, beginning and end of text), then the words of the lists.
pub(super) fn vocabulary() -> Vec<String> {
    let hard = HARD_NOUNS.iter().chain(&HARD_VERBS).chain(&HARD_ADVERBS);
    let words = [&FRAME[..], &NAMES, &SUBJECTS, &PLACES, &COLOURS, &TRADES, &LETTERS]
        .into_iter()
        .flatten()
        .chain(STANCES.iter().flatten())
        .chain(&OTHER_NOUNS)
        .chain(MOODS.iter().flatten())
        .chain(NOUNS.iter().chain(&VERBS).chain(&FILLERS).chain(&FUNCTIONS).chain(&VARIABLES))
        .chain(THINGS.iter().chain(&PROPERTIES))
        .chain(hard.flat_map(|(hard, easy)| [hard, easy]))
        .map(|word| (*word).to_owned());
    words.chain((1..=18).map(|number| number.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_comes_twice() {
        let words = vocabulary();
        let known: std::collections::HashSet<&String> = words.iter().collect();
        assert_eq!(known.len(), words.len());
    }
}

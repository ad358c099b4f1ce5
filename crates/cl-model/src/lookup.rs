//! Prompt-lookup decoding (Saxena, 2023): candidate tokens are copied from the text itself and verified by the model.

/// Maximum number of rows in a step. Up to this number, a step takes little longer than with one row, because it is
/// bound by the memory bandwidth for the weights.
const ROWS: usize = 64;

/// Maximum number of candidate tokens per text and step.
const MOST: usize = 16;

/// Lengths of the suffixes that are searched for in the text, longest first.
const ENDS: [usize; 3] = [4, 3, 2];

/// Number of candidate tokens for a text: increased if all were accepted, decreased otherwise.
pub(crate) struct Lookup {
    length: usize,
}

impl Default for Lookup {
    fn default() -> Lookup {
        Lookup { length: MOST / 4 }
    }
}

impl Lookup {
    /// Returns candidates for the continuation of `text`, at most `room` tokens, in a step of `texts` texts: the tokens
    /// after the last earlier occurrence of its suffix.
    pub(crate) fn guess<'t>(&self, text: &'t [u32], room: usize, texts: usize) -> Option<&'t [u32]> {
        let most = self.length.min(room).min(ROWS.saturating_sub(texts) / texts);
        let place = ENDS.iter().filter(|_| most > 0).find_map(|&length| place_behind(text, length))?;
        Some(&text[place..text.len().min(place + most)])
    }

    /// Returns the tokens that the model chose after the text's last token and after each candidate, up to the first
    /// that differs from its candidate: the choices after a wrong candidate are invalid.
    pub(crate) fn check(&mut self, guess: &[u32], chosen: impl Iterator<Item = u32>) -> Vec<u32> {
        let mut chosen: Vec<u32> = chosen.collect();
        let right = chosen.iter().zip(guess).take_while(|(a, b)| a == b).count();
        chosen.truncate(1 + right);
        if right < guess.len() {
            self.length = right.max(1);
        } else if right > 0 {
            self.length = (self.length * 2).min(MOST);
        }
        chosen
    }
}

/// Returns the position after the last earlier occurrence of the text's last `length` tokens.
fn place_behind(text: &[u32], length: usize) -> Option<usize> {
    let end = text.len().checked_sub(length)?;
    let last = &text[end..];
    (0..end).rev().find(|&start| text[start..start + length] == *last).map(|start| start + length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_end_is_found_at_its_last_place() {
        let lookup = Lookup::default();
        let guess = |text: &'static [u32], room| lookup.guess(text, room, 1).unwrap_or_default();
        assert_eq!(guess(&[1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3], 9), [5, 9, 1, 2]);
        // An occurrence of three tokens is preferred to a later one of two.
        assert_eq!(guess(&[1, 2, 3, 4, 7, 2, 3, 6, 1, 2, 3], 9), [4, 7, 2, 3]);
        assert_eq!(guess(&[1, 2, 3, 4, 7, 2, 3, 6, 1, 2, 3], 1), [4]);
        assert_eq!(guess(&[5, 5, 5], 9), [5]); // an occurrence may overlap the suffix
        assert!(guess(&[1, 2, 3], 9).is_empty() && guess(&[1], 9).is_empty() && guess(&[5, 5, 5], 0).is_empty());
    }

    #[test]
    fn guesses_grow_with_success_and_leave_room_for_other_texts() {
        let text: Vec<u32> = (0..40).chain(0..2).collect();
        let mut lookup = Lookup::default();
        let len = |lookup: &Lookup, texts| lookup.guess(&text, 99, texts).map_or(0, <[u32]>::len);
        assert_eq!([1, 32, 64, 65].map(|texts| len(&lookup, texts)), [4, 1, 0, 0]);
        assert_eq!(lookup.check(&[2, 3, 4, 5], [2, 3, 4, 5, 6].into_iter()), [2, 3, 4, 5, 6]);
        assert_eq!(len(&lookup, 1), 8);
        assert_eq!(lookup.check(&[2, 3, 4, 5], [2, 3, 9, 5, 6].into_iter()), [2, 3, 9]);
        assert_eq!(len(&lookup, 1), 2);
        assert_eq!(lookup.check(&[2, 3], [7, 3, 4].into_iter()), [7]);
        assert_eq!(len(&lookup, 1), 1);
        assert_eq!(lookup.check(&[], [7].into_iter()), [7]); // without candidates, the number does not change
        assert_eq!(len(&lookup, 1), 1);
    }
}

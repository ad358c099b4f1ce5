//! Prompt templates of known data sets.

use crate::Example;

/// Returns Alpaca's prompt (Taori et al., 2023), with or without an input. The answer directly follows `### Response:`.
///
/// ```
/// let prompt = cl_data::template::alpaca("Add.", "");
/// assert!(prompt.ends_with("### Instruction:\nAdd.\n\n### Response:"));
/// ```
pub fn alpaca(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
             response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\
             \n\n### Response:"
        )
    }
}

/// Returns an example of MetaMathQA: the first line of `query` is the instruction of Alpaca's prompt, the other lines
/// are its input.
pub fn metamath(query: &str, response: &str) -> Example {
    let (instruction, input) = query.split_once('\n').unwrap_or((query, ""));
    Example::pair(alpaca(instruction, input), response)
}

/// Returns an example of GSM8K: `Question: …`, `Answer:`, and a space before the answer, as in lm-evaluation-harness.
pub fn gsm8k(question: &str, answer: &str) -> Example {
    Example::pair(format!("Question: {question}\nAnswer:"), format!(" {answer}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metamath_splits_at_the_first_line() {
        let with = metamath("Solve.\nx = 1\ny = 2", "3");
        assert!(with.shown().contains("### Instruction:\nSolve.\n\n### Input:\nx = 1\ny = 2\n\n### Response:"));
        assert!(with.shown().contains("paired with an input"));
        let without = metamath("Solve.", "3");
        assert!(!without.shown().contains("### Input"));
        assert!(without.shown().ends_with("### Response:"));
        assert_eq!(without.answer(), "3");
    }
}

//! Scoring on several ranks: rank 0 distributes the requests, each rank answers a part, and rank 0 collects the
//! answers.

use cl_checkpoint::Interrupt;
use cl_eval::{Answered, BoxError, GenerateRequest, LanguageModel, Loglikelihood, LoglikelihoodRequest};
use cl_model::Scorer;
use cl_train::Ranks;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::LabError;
use crate::round::take_over_stop;

/// Message from rank 0 to the other ranks.
#[derive(Serialize, Deserialize)]
enum Order {
    /// Answer these requests together; each rank answers its own part.
    Answer { requests: Requests, add_bos_token: Option<bool> },
    /// There are no more requests, because all are answered or a stop was requested.
    End { stopped: bool },
}

/// Requests of either kind.
#[derive(Serialize, Deserialize)]
enum Requests {
    Loglikelihood(Vec<LoglikelihoodRequest>),
    Generate(Vec<GenerateRequest>),
}

/// What a rank sends back.
#[derive(Serialize, Deserialize)]
struct Part<A> {
    /// Answers, each with the index of its request.
    answers: Vec<(usize, A)>,
    /// Number of requests whose text was truncated.
    truncated: usize,
    /// Why some requests were not answered.
    failure: Option<String>,
    /// Whether the rank was asked to stop.
    stopped: bool,
}

/// Number of batches per rank in one exchange of requests and answers. It is small, so that ranks do not wait long for
/// each other, and a killed run loses little work.
const BATCHES: usize = 4;

/// Approximate number of characters per token in requests.
const TOKEN_CHARS: usize = 4;

/// The model on all ranks, as used by rank 0.
pub(crate) struct RankedScorer<'a, 'm> {
    pub(crate) scorer: Scorer<'m>,
    pub(crate) ranks: &'a Ranks,
    pub(crate) interrupt: &'a Interrupt,
}

impl RankedScorer<'_, '_> {
    /// Tells the other ranks that there are no more requests.
    pub(crate) fn end(&self, stopped: bool) -> Result<(), LabError> {
        send(self.ranks, &Order::End { stopped })
    }

    /// Lets all ranks answer `requests`, a few batches per rank at a time.
    fn ask<R: Clone, A: Serialize + DeserializeOwned>(
        &mut self,
        requests: &[R],
        rounds: &[usize],
        kind: impl Fn(Vec<R>) -> Requests,
        own: impl Fn(&mut Scorer<'_>, &[R], Answered<'_, A>) -> Result<(), BoxError>,
        answered: Answered<'_, A>,
    ) -> Result<(), BoxError> {
        let mut start = 0;
        for &count in rounds {
            let asked = &requests[start..start + count];
            let add_bos_token = self.scorer.add_bos_token;
            send(self.ranks, &Order::Answer { requests: kind(asked.to_vec()), add_bos_token })?;
            let part = answer(&mut self.scorer, self.ranks, self.interrupt, asked, &own);
            let parts = exchange(self.ranks, &part)?;
            let stopped = parts.iter().any(|part| part.stopped);
            let failure = parts.iter().find_map(|part| part.failure.clone());
            // The scorer has already counted those of this rank.
            self.scorer.truncated += parts.iter().skip(1).map(|part| part.truncated).sum::<usize>();
            for part in parts {
                part.answers.into_iter().try_for_each(|(i, answer)| answered(start + i, answer))?;
            }
            if stopped {
                take_over_stop(self.interrupt);
                return Err("stopped".into());
            }
            if let Some(failure) = failure {
                return Err(failure.into());
            }
            start += count;
        }
        Ok(())
    }
}

impl LanguageModel for RankedScorer<'_, '_> {
    fn loglikelihood(
        &mut self,
        requests: &[LoglikelihoodRequest],
        answered: Answered<'_, Loglikelihood>,
    ) -> Result<(), BoxError> {
        let room = self.scorer.batch_tokens.saturating_mul(BATCHES * TOKEN_CHARS * self.ranks.world_size());
        let rounds = rounds_of(requests, room);
        self.ask(
            requests,
            &rounds,
            Requests::Loglikelihood,
            |s, part, answered| s.loglikelihood(part, answered),
            answered,
        )
    }

    fn generate(&mut self, requests: &[GenerateRequest], answered: Answered<'_, String>) -> Result<(), BoxError> {
        let most = self.scorer.batch_sequences.saturating_mul(self.ranks.world_size()).max(1);
        let rounds: Vec<usize> = requests.chunks(most).map(<[_]>::len).collect();
        self.ask(requests, &rounds, Requests::Generate, |s, part, answered| s.generate(part, answered), answered)
    }

    fn fingerprint(&self) -> Option<String> {
        self.scorer.fingerprint()
    }
}

/// Answers rank 0's requests until there are no more.
///
/// # Errors
/// Returns [`cl_eval::Error::Interrupted`] if a rank was asked to stop, and an error if rank 0 has exited.
pub(crate) fn serve(scorer: &mut Scorer<'_>, ranks: &Ranks, interrupt: &Interrupt) -> Result<(), LabError> {
    loop {
        let order: Order = receive(&ranks.text_from_first("")?)?;
        match order {
            Order::Answer { requests, add_bos_token } => {
                scorer.add_bos_token = add_bos_token;
                match requests {
                    Requests::Loglikelihood(requests) => {
                        let part = answer(scorer, ranks, interrupt, &requests, |s, part, answered| {
                            s.loglikelihood(part, answered)
                        });
                        exchange(ranks, &part)?;
                    }
                    Requests::Generate(requests) => {
                        let part =
                            answer(scorer, ranks, interrupt, &requests, |s, part, answered| s.generate(part, answered));
                        exchange(ranks, &part)?;
                    }
                }
            }
            Order::End { stopped: true } => {
                take_over_stop(interrupt);
                return Err(cl_eval::Error::Interrupted.into());
            }
            Order::End { stopped: false } => return Ok(()),
        }
    }
}

/// Answers this rank's part of the requests.
fn answer<R, A>(
    scorer: &mut Scorer<'_>,
    ranks: &Ranks,
    interrupt: &Interrupt,
    requests: &[R],
    ask: impl Fn(&mut Scorer<'_>, &[R], Answered<'_, A>) -> Result<(), BoxError>,
) -> Part<A> {
    let (rank, ranks) = (ranks.rank(), ranks.world_size());
    let from = requests.len() * rank / ranks;
    let to = requests.len() * (rank + 1) / ranks;
    let before = scorer.truncated;
    let mut answers = Vec::with_capacity(to - from);
    let outcome = ask(scorer, &requests[from..to], &mut |i, answer| {
        answers.push((from + i, answer));
        if interrupt.requested() { Err("stopped".into()) } else { Ok(()) }
    });
    let failure = outcome.err().map(|e| format!("rank {rank}: {e}"));
    Part { answers, truncated: scorer.truncated - before, failure, stopped: interrupt.requested() }
}

/// Splits requests into rounds of about `room` characters each, and returns the number of requests in each. A context
/// shared by consecutive requests is computed once and counted once.
fn rounds_of(requests: &[LoglikelihoodRequest], room: usize) -> Vec<usize> {
    let (mut rounds, mut count, mut used) = (Vec::new(), 0, 0);
    for (i, request) in requests.iter().enumerate() {
        let again = i > 0 && requests[i - 1].context == request.context;
        let chars = request.continuation.len() + if again { 0 } else { request.context.len() };
        if count > 0 && !again && used + chars > room {
            rounds.push(count);
            (count, used) = (0, 0);
        }
        count += 1;
        used += chars;
    }
    rounds.extend((count > 0).then_some(count));
    rounds
}

fn send(ranks: &Ranks, order: &Order) -> Result<(), LabError> {
    ranks.text_from_first(&text(order))?;
    Ok(())
}

/// Sends this rank's part, and returns the parts of all ranks.
fn exchange<A: Serialize + DeserializeOwned>(ranks: &Ranks, part: &Part<A>) -> Result<Vec<Part<A>>, LabError> {
    ranks.texts_of_all(&text(part))?.iter().map(|text| receive(text)).collect()
}

fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("texts and numbers always serialize")
}

fn receive<T: DeserializeOwned>(text: &str) -> Result<T, LabError> {
    serde_json::from_str(text).map_err(|_| LabError::RankVersions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_with_one_context_stay_together_and_count_once() {
        let request =
            |context: &str| LoglikelihoodRequest { context: context.to_owned(), continuation: "ab".to_owned() };
        let requests: Vec<LoglikelihoodRequest> =
            ["aaaa", "aaaa", "aaaa", "bbbb", "bbbb", "cccccccccc"].map(request).into();
        assert_eq!(rounds_of(&requests, 18), [5, 1]);
        assert_eq!(rounds_of(&requests, 10), [3, 2, 1]);
        assert_eq!(rounds_of(&requests, 1), [3, 2, 1]);
        assert_eq!(rounds_of(&[], 1), [0; 0]);
    }
}

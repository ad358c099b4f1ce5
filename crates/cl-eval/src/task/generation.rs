use super::Task;
use crate::metrics::{Metric, Target};
use crate::request::{GenerateRequest, Request};

/// A prompt and its reference answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The prompt.
    pub prompt: String,
    /// The reference answer.
    pub reference: String,
    /// Source text for SARI; defaults to the prompt.
    pub source: Option<String>,
}

/// A task whose answers are generated texts.
pub struct GenerationTask {
    /// Name of the task.
    pub name: String,
    /// How answers are scored.
    pub metric: Metric,
    /// The documents.
    pub documents: Vec<Document>,
    /// Maximum number of new tokens.
    pub max_new_tokens: usize,
    /// Stop sequences.
    pub stop: Vec<String>,
}

impl Task for GenerationTask {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> usize {
        self.documents.len()
    }

    fn request(&self, document: usize) -> Request {
        Request::Generate(GenerateRequest {
            prompt: self.documents[document].prompt.clone(),
            max_new_tokens: self.max_new_tokens,
            stop: self.stop.clone(),
        })
    }

    fn target(&self, document: usize) -> Target {
        let Document { prompt, reference, source } = &self.documents[document];
        let source = (self.metric == Metric::Sari).then(|| source.as_ref().unwrap_or(prompt).clone());
        Target::Reference { reference: reference.clone(), source }
    }

    fn metric(&self) -> Metric {
        self.metric
    }
}

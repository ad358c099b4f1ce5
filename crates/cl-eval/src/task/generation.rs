use super::Task;
use crate::metrics::{Metric, Target};
use crate::request::{GenerateRequest, Request};

/// A prompt and what should follow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// What the model is shown.
    pub prompt: String,
    /// What it should write.
    pub reference: String,
    /// What SARI compares the answer with, when that is not the prompt.
    pub source: Option<String>,
}

/// A task whose answers are written.
pub struct GenerationTask {
    /// Name, as in tables.
    pub name: String,
    /// How answers are scored.
    pub metric: Metric,
    /// The documents.
    pub documents: Vec<Document>,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Texts that end an answer.
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

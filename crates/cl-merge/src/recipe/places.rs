//! Models of a merge file that are not local directories: Hub names, and the paths of their files.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::config::{MergeConfig, MergeFile, model_and_adapter};

/// A model or adapter in a merge file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// Name as written in the file.
    pub written: String,
    /// Name with the pinned commit, if there is one.
    pub pinned: String,
    /// Whether it is an adapter, written after `+`.
    pub adapter: bool,
}

impl MergeFile {
    /// Returns the models and adapters in the file that are not stages, each once.
    pub fn named(&self) -> Vec<Named> {
        let stages: Vec<&str> = self.stages.iter().filter_map(|s| s.name.as_deref()).collect();
        let mut all: Vec<Named> = Vec::new();
        for stage in &self.stages {
            for written in stage.written_models() {
                let (model, adapter) = model_and_adapter(written);
                let parts = [(Some(model).filter(|m| !stages.contains(m)), false), (adapter, true)];
                for (name, adapter) in parts.into_iter().filter_map(|(name, adapter)| Some((name?, adapter))) {
                    if all.iter().all(|n| n.written != name) {
                        all.push(Named { written: name.to_owned(), pinned: stage.pinned(name), adapter });
                    }
                }
            }
        }
        all
    }

    /// Sets the directory and the commit of a model or adapter from the Hub. The resolved configuration contains the
    /// commit under `revisions`.
    pub fn place(&mut self, written: &str, dir: PathBuf, commit: &str) {
        for stage in &mut self.stages {
            if stage.written_models().into_iter().any(|m| {
                let (model, adapter) = model_and_adapter(m);
                model == written || adapter == Some(written)
            }) {
                stage.revisions.insert(written.to_owned(), commit.to_owned());
                stage.places.insert(written.to_owned(), dir.clone());
            }
        }
    }
}

impl MergeConfig {
    /// Returns a name with its commit from `revisions`.
    fn pinned(&self, written: &str) -> String {
        match self.revisions.get(written) {
            Some(commit) => format!("{}@{commit}", repository(written)),
            None => written.to_owned(),
        }
    }

    /// Returns the name of a model or adapter for a model card: the repository without a revision, or the path as
    /// written.
    pub(crate) fn card_name<'a>(&self, written: &'a str) -> &'a str {
        if self.revisions.contains_key(written) { repository(written) } else { written }
    }

    /// Returns the directories of models by name, for earlier stages and Hub models.
    pub(crate) fn directories(&self, stages: &BTreeMap<String, PathBuf>) -> BTreeMap<String, PathBuf> {
        let mut directories = self.places.clone();
        directories.extend(stages.clone());
        directories
    }
}

/// Returns `organization/name` for `organization/name@revision`.
fn repository(written: &str) -> &str {
    written.split_once('@').map_or(written, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models_and_adapters_keep_their_commits() {
        let text = "
            [[stage]]
            name = 'first'
            method = 'linear'
            models = [{ model = 'o/a+o/lora@v1', weight = 1.0 }, { model = './b', weight = 1.0 }]
            [[stage]]
            method = 'linear'
            models = [{ model = 'first', weight = 1.0 }, { model = 'o/a', weight = 1.0 }]
        ";
        let mut file = MergeFile::from_toml(text).unwrap();
        let named: Vec<_> = file.named().into_iter().map(|n| (n.written, n.adapter)).collect();
        let expected = [("o/a", false), ("o/lora@v1", true), ("./b", false)];
        assert_eq!(named, expected.map(|(name, adapter)| (name.to_owned(), adapter)));
        file.place("o/lora@v1", "dir".into(), "c0ffee");
        assert_eq!(file.named()[1].pinned, "o/lora@c0ffee");
        assert_eq!(file.stages[0].directories(&BTreeMap::new())["o/lora@v1"], PathBuf::from("dir"));
        assert!(file.stages[1].revisions.is_empty());
        // The resolved file keeps the commit when it is read again.
        let resolved = toml::to_string(&BTreeMap::from([("stage", &file.stages)])).unwrap();
        assert_eq!(MergeFile::from_toml(&resolved).unwrap().named()[1].pinned, "o/lora@c0ffee");
    }
}

//! Finds the files of a repository that belong to a split.
//!
//! Supported layouts: <https://huggingface.co/docs/hub/datasets-data-files-configuration> and `push_to_hub` of
//! `datasets`
//! (`data/train-00000-of-00002.parquet`, `config/train-…`), and the branch `refs/convert/parquet`
//! (`config/train/0000.parquet`, <https://huggingface.co/docs/dataset-viewer/parquet>).

use std::collections::BTreeSet;

use super::error::ShardGap;

/// Extensions of data files, in order of preference.
const KINDS: [&str; 5] = [".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz"];

/// JSON files in repositories that are not data.
const NO_DATA: [&str; 5] = ["dataset_infos", "dataset_info", "dataset_dict", "state", "config"];

/// Why no files were selected.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Miss {
    /// There is no such split; these are the existing ones.
    Nothing(Vec<String>),
    /// Several configurations have the split.
    Ambiguous(Vec<String>),
    /// Some of its files are missing.
    Shards(ShardGap),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct DataFile {
    /// Whether it is part of a partial conversion, which ranks below a complete one.
    partial: bool,
    kind: usize,
    folder: String,
    of: Option<usize>,
    shard: usize,
    path: String,
    config: Option<String>,
    split: String,
}

/// Returns the files of a split in the order of its rows. Without `config`: files without a configuration, or else
/// those of `default`, or else those of the only configuration that has the split.
pub(crate) fn pick(paths: &[String], config: Option<&str>, split: &str) -> Result<Vec<String>, Miss> {
    let files: Vec<DataFile> = paths.iter().filter_map(|p| parse(p)).collect();
    let of_split: Vec<&DataFile> = files.iter().filter(|f| f.split == split).collect();
    let configs: BTreeSet<Option<&str>> = of_split.iter().map(|f| f.config.as_deref()).collect();
    let wanted = match config {
        Some(name) if configs.contains(&Some(name)) => Some(name),
        Some("default") if configs.contains(&None) => None,
        Some(_) => return Err(Miss::Nothing(found(&files))),
        None if configs.contains(&None) => None,
        None if configs.contains(&Some("default")) => Some("default"),
        None if configs.len() > 1 => {
            return Err(Miss::Ambiguous(configs.into_iter().flatten().map(str::to_owned).collect()));
        }
        None => configs.into_iter().next().ok_or_else(|| Miss::Nothing(found(&files)))?,
    };
    let mut of_config: Vec<&DataFile> = of_split.into_iter().filter(|f| f.config.as_deref() == wanted).collect();
    of_config.sort();
    let group = |f: &DataFile| (f.partial, f.kind, f.folder.clone(), f.of);
    let first = group(of_config[0]);
    of_config.retain(|f| group(f) == first);
    whole(&of_config)?;
    Ok(of_config.into_iter().map(|f| f.path.clone()).collect())
}

/// Checks that shards are numbered from 0 without gaps, up to the count in their names if there is one.
fn whole(files: &[&DataFile]) -> Result<(), Miss> {
    let numbers: Vec<usize> = files.iter().map(|f| f.shard).collect();
    let count = files[0].of.unwrap_or(numbers.len());
    if numbers.iter().copied().eq(0..count) {
        return Ok(());
    }
    let missing = (0..count).find(|n| !numbers.contains(n));
    Err(Miss::Shards(ShardGap { found: numbers.len(), expected: count, missing, file: files[0].path.clone() }))
}

fn parse(path: &str) -> Option<DataFile> {
    let kind = KINDS.iter().position(|ending| path.ends_with(ending))?;
    let stem = path.strip_suffix(KINDS[kind])?;
    let mut folders: Vec<&str> = stem.split('/').collect();
    let name = folders.pop()?;
    let folder = folders.join("/");
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
    let (mut split, shard, of) = match (number(name), folders.last()) {
        (Some(shard), Some(split)) => (*split, shard, None),
        _ => sharded(name).unwrap_or((name, 0, None)),
    };
    if folders.last() == Some(&split) {
        folders.pop();
    }
    let partial = split.starts_with("partial-");
    split = split.strip_prefix("partial-").unwrap_or(split);
    if NO_DATA.contains(&split) || path.starts_with('.') {
        return None;
    }
    folders.retain(|f| *f != "data");
    let config = (!folders.is_empty()).then(|| folders.join("/"));
    Some(DataFile { partial, kind, folder, of, shard, path: path.to_owned(), config, split: split.to_owned() })
}

/// Parses `train-00001-of-00003`, optionally with the hash that earlier versions of `datasets` appended.
fn sharded(name: &str) -> Option<(&str, usize, Option<usize>)> {
    let (before, after) = name.rsplit_once("-of-")?;
    let (split, shard) = before.rsplit_once('-')?;
    let count = after.split_once('-').map_or(after, |(count, _)| count);
    Some((split, shard.parse().ok()?, Some(count.parse().ok()?)))
}

/// Returns the existing splits.
fn found(files: &[DataFile]) -> Vec<String> {
    let names: BTreeSet<String> = files.iter().map(|f| label(f.config.as_deref(), &f.split)).collect();
    names.into_iter().collect()
}

/// Formats configuration and split as one string.
pub(crate) fn label(config: Option<&str>, split: &str) -> String {
    config.map_or_else(|| split.to_owned(), |config| format!("{config}/{split}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picked(paths: &[&str], config: Option<&str>, split: &str) -> Result<Vec<String>, Miss> {
        pick(&paths.iter().map(|p| p.to_string()).collect::<Vec<_>>(), config, split)
    }

    #[test]
    fn usual_layouts() {
        type Case<'a> = (&'a [&'a str], Option<&'a str>, &'a str, &'a [&'a str]);
        let rows: [Case; 12] = [
            (&["README.md", "test.jsonl", "train.jsonl"], None, "test", &["test.jsonl"]),
            (&["data/train-00000-of-00001.parquet"], None, "train", &["data/train-00000-of-00001.parquet"]),
            (
                &["data/x-00001-of-00002-ab12.parquet", "data/x-00000-of-00002-cd34.parquet"],
                None,
                "x",
                &["data/x-00000-of-00002-cd34.parquet", "data/x-00001-of-00002-ab12.parquet"],
            ),
            (&["main/test-00000-of-00001.parquet"], None, "test", &["main/test-00000-of-00001.parquet"]),
            (&["a/test.json", "b/test.json"], Some("b"), "test", &["b/test.json"]),
            (&["a/test.json", "default/test.json"], None, "test", &["default/test.json"]),
            (&["a/test.json", "test.json"], None, "test", &["test.json"]),
            (&["test.json", "test.jsonl", "data/test.parquet"], None, "test", &["data/test.parquet"]),
            (
                &["c/test/0001.parquet", "c/test/0000.parquet"],
                Some("c"),
                "test",
                &["c/test/0000.parquet", "c/test/0001.parquet"],
            ),
            (&["c/partial-test/0000.parquet"], Some("c"), "test", &["c/partial-test/0000.parquet"]),
            (
                &["data/test/test-00000-of-00001.parquet"],
                Some("default"),
                "test",
                &["data/test/test-00000-of-00001.parquet"],
            ),
            (
                &["ARC-Easy/a-b-00000-of-00001.parquet"],
                Some("ARC-Easy"),
                "a-b",
                &["ARC-Easy/a-b-00000-of-00001.parquet"],
            ),
        ];
        for (paths, config, split, expected) in rows {
            assert_eq!(picked(paths, config, split).unwrap(), expected, "{paths:?}");
        }
    }

    #[test]
    fn shards_are_ordered_by_number() {
        let paths: Vec<String> = (0..12).rev().map(|i| format!("c/train/{i}.parquet")).collect();
        let picked = pick(&paths, None, "train").unwrap();
        assert_eq!((picked[2].as_str(), picked[11].as_str()), ("c/train/2.parquet", "c/train/11.parquet"));
    }

    #[test]
    fn misses() {
        let nothing = picked(&["a/train.json", "test.json", "dataset_infos.json"], None, "dev").unwrap_err();
        assert_eq!(nothing, Miss::Nothing(vec!["a/train".to_owned(), "test".to_owned()]));
        let configs = picked(&["a/train.json", "b/train.json"], None, "train").unwrap_err();
        assert_eq!(configs, Miss::Ambiguous(vec!["a".to_owned(), "b".to_owned()]));
        for paths in [
            &["x-00000-of-00003.parquet", "x-00002-of-00003.parquet"][..],
            &["x-00000-of-00001-a.parquet", "x-00000-of-00001-b.parquet"],
            &["c/x/0001.parquet"],
        ] {
            assert!(matches!(picked(paths, None, "x"), Err(Miss::Shards(_))), "{paths:?}");
        }
        assert!(matches!(picked(&["README.md"], None, "x"), Err(Miss::Nothing(_))));
    }
}

//! Methods that are not built in: in merges of several stages, and in mergekit's YAML.

use std::path::Path;

use cl_checkpoint::{Checkpoint, Interrupt};
use cl_merge::methods::{Defaults, MethodInfo, ParameterInfo, SettingsError, TensorSettings};
use cl_merge::{
    Error, Event, MergeFile, MergeMethod, MergeOptions, MergePieces, MethodRegistry, Piece, Plan, TensorGroup,
    run_file_with,
};
use serde::Deserialize;

use super::models::Llama;
use super::{run, values};

/// `θ₀ + alpha · δ` for the model with the largest task vector, entry by entry. `alpha` is also a parameter of other
/// methods of mergekit.
#[derive(Deserialize)]
struct Farthest {
    alpha: f32,
}

static FARTHEST: MethodInfo = MethodInfo {
    parameters: &["alpha"],
    own_parameters: &[ParameterInfo::number("alpha", "scale", "0 to 2", (0.0, 2.0))],
    defaults: |_| Defaults::new().with("alpha", 1.0),
    ..MethodInfo::new("farthest", build)
};

fn build(settings: &TensorSettings<'_>) -> Result<Box<dyn MergeMethod>, SettingsError> {
    Ok(Box::new(settings.read::<Farthest>()?))
}

impl MergeMethod for Farthest {
    fn task_vectors(&self) -> bool {
        true
    }

    fn prepare<'t>(&'t self, _group: &'t TensorGroup<'_>) -> Result<Box<dyn MergePieces + 't>, Error> {
        Ok(Box::new(|piece: &mut Piece, out: &mut [f32]| {
            for (i, out) in out.iter_mut().enumerate() {
                let deltas = piece.models.iter().map(|model| model[i]);
                let farthest = deltas.reduce(|a, b| if b.abs() > a.abs() { b } else { a }).unwrap_or_default();
                *out = piece.base[i] + self.alpha * farthest;
            }
        }))
    }
}

fn methods() -> MethodRegistry {
    MethodRegistry::builtin().with(&FARTHEST).unwrap()
}

/// Writes a base and two models, and returns the text with their directories in place of BASE, AAA and BBB.
fn placed(folder: &Path, text: &str) -> String {
    Llama::default().family(folder, 2);
    [("BASE", "base"), ("AAA", "ft1"), ("BBB", "ft2")]
        .iter()
        .fold(text.to_owned(), |text, (name, dir)| text.replace(name, &folder.join(dir).display().to_string()))
}

const STAGES: &str = "
name: first
merge_method: farthest
base_model: BASE
models: [{model: AAA}, {model: BBB}]
---
name: second
merge_method: linear
models:
  - {model: first, parameters: {weight: 1}}
  - {model: AAA, parameters: {weight: 1}}
---
merge_method: farthest
base_model: BASE
models: [{model: second}, {model: BBB}]
parameters: {alpha: 0.5}
";

#[test]
fn any_stage_can_use_them_and_finished_stages_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let text = placed(folder.path(), STAGES);
    let file = MergeFile::from_yaml(&text).unwrap();
    let out = folder.path().join("out");
    let options = MergeOptions { interrupt: Interrupt::default(), ..MergeOptions::default() };
    let stopped = run_file_with(&file, &methods(), &out, &options, &|event| {
        if matches!(event, Event::Stage("second", _)) {
            options.interrupt.request();
        }
    });
    assert!(matches!(stopped, Err(Error::Interrupted)), "{:?}", stopped.err());
    let kept = std::sync::Mutex::new(Vec::new());
    run_file_with(&file, &methods(), &out, &MergeOptions::default(), &|event| {
        if let Event::Kept(name) = event {
            kept.lock().unwrap().push(name.to_owned());
        }
    })
    .unwrap();
    assert_eq!(kept.into_inner().unwrap(), ["first"]);
    // The recorded file has all stages, and gives the same model.
    let again = MergeFile::read(&out.join("merge_config.toml")).unwrap();
    assert_eq!(again.stages.len(), 3);
    let other = folder.path().join("again");
    run_file_with(&again, &methods(), &other, &MergeOptions::default(), &|_| ()).unwrap();
    let values = |dir: &Path| values(&Checkpoint::open(dir).unwrap());
    assert!(values(&out) == values(&other));
}

#[test]
fn problems_of_all_stages_are_reported_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let text = placed(folder.path(), &STAGES.replace("alpha: 0.5", "alpha: 3, alhpa: 1"));
    let file = MergeFile::from_yaml(&text.replace("merge_method: linear", "merge_method: farhtest")).unwrap();
    let out = folder.path().join("out");
    let problems = |methods: &MethodRegistry| {
        let error = run_file_with(&file, methods, &out, &MergeOptions::default(), &|_| ()).unwrap_err();
        assert!(matches!(error, Error::Problems(_)) && !out.exists(), "{error}");
        error.to_string()
    };
    let found = problems(&methods());
    for part in [
        "stage second: no method is called `farhtest` (did you mean `farthest`?)",
        "stage result: method.farthest: `alpha` is 3; it must be 0 to 2",
        "farthest has no parameter `alhpa` (did you mean `alpha`?); it has alpha",
    ] {
        assert!(found.contains(part), "{part} is not in {found}");
    }
    let found = problems(&MethodRegistry::builtin());
    assert!(found.contains("stage first: no method is called `farthest`"), "{found}");
}

/// Parameters of mergekit's methods are ignored if the method does not have them, and only then.
#[test]
fn yaml_sets_their_parameters_and_ignores_those_of_others() {
    let folder = tempfile::tempdir().unwrap();
    let text = placed(
        folder.path(),
        "merge_method: farthest\nbase_model: BASE\nmodels: [{model: AAA, parameters: {weight: 1}}]\n\
         parameters: {alpha: 0, density: 0.5}\n",
    );
    let file = MergeFile::from_yaml(&text).unwrap();
    let plan = Plan::with_methods(&file.stages[0], &methods()).unwrap();
    assert_eq!(plan.notes, ["`density` has no effect with farthest", "`weight` has no effect with farthest"]);
    let out = folder.path().join("out");
    run_file_with(&file, &methods(), &out, &MergeOptions::default(), &|_| ()).unwrap();
    assert!(
        values(&Checkpoint::open(&out).unwrap()) == values(&Checkpoint::open(&folder.path().join("base")).unwrap())
    );
    // The recorded file has only what had an effect.
    let recorded = std::fs::read_to_string(out.join("merge_config.toml")).unwrap();
    assert!(recorded.contains("alpha = 0") && !recorded.contains("density"), "{recorded}");
}

/// Files that name only built-in methods give the same model with any registry.
#[test]
fn built_in_methods_are_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let text = placed(folder.path(), "merge_method: ties\nbase_model: BASE\nmodels: [{model: AAA}, {model: BBB}]\n");
    let file = MergeFile::from_yaml(&text).unwrap();
    let out = folder.path().join("out");
    run_file_with(&file, &methods(), &out, &MergeOptions::default(), &|_| ()).unwrap();
    let (_folder, built_in) = run(&file.stages[0]);
    assert!(values(&Checkpoint::open(&out).unwrap()) == values(&built_in));
}

#[test]
fn names_are_unique_and_parameters_are_described() {
    static TIES: MethodInfo = MethodInfo::new("ties", build);
    static CUT: MethodInfo = MethodInfo { parameters: &["weight", "cut"], ..MethodInfo::new("cut", build) };
    let message = |method: &'static MethodInfo| methods().with(method).unwrap_err().to_string();
    assert_eq!(message(&TIES), "a method called `ties` exists; choose another name");
    assert_eq!(message(&FARTHEST), "a method called `farthest` exists; choose another name");
    assert_eq!(message(&CUT), "cut lists the parameter `cut` without describing it; add it to `own_parameters`");
    let names: Vec<&str> = methods().iter().map(|method| method.name).collect();
    assert_eq!((names.len(), names.last()), (cl_merge::METHODS.len() + 1, Some(&"farthest")));
}

//! `cargo xtask bench merge`: times complete merges and compares them with mergekit in the same run. The results are
//! written to docs/benchmarks.md.
//!
//! Environment variables: `CL_BENCH_DIR` is a directory for models (default: `bench` in the cache), `CL_MERGEKIT` the
//! program `mergekit-yaml`, `CL_APR` the program `apr`; without these two, their columns stay empty. `CL_BENCH_MODELS`
//! is a directory with `base` and `ft0` … `ft6` to use instead of the synthetic 135M models.

use std::fmt::Write as _;
use std::fs;
#[cfg(unix)]
use std::os::unix::fs::symlink;
#[cfg(windows)]
use std::os::windows::fs::symlink_dir as symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::command::{cargo, run as run_command};
use crate::{cache, root};

const START: &str = "<!-- merge: written by cargo xtask bench merge -->";
const END: &str = "<!-- merge: end -->";

/// Runs a benchmark by its name.
pub fn run(arguments: &[String]) -> Result<()> {
    match arguments {
        [name] if name == "merge" => merge(false),
        [name, flag] if name == "merge" && flag == "--quick" => merge(true),
        _ => bail!("expected `cargo xtask bench merge [--quick]`"),
    }
}

/// The programs to run, and directories.
struct Bench {
    ours: PathBuf,
    mergekit: Option<PathBuf>,
    apr: Option<PathBuf>,
    folder: PathBuf,
    runs: usize,
}

/// Time and memory of a command, measured over several runs.
#[derive(Clone, Copy)]
struct Measured {
    seconds: f64,
    megabytes: f64,
}

fn merge(quick: bool) -> Result<()> {
    let program = |variable: &str| std::env::var_os(variable).map(PathBuf::from).filter(|p| p.exists());
    let folder = std::env::var_os("CL_BENCH_DIR").map_or_else(|| cache().map(|c| c.join("bench")), |d| Ok(d.into()))?;
    run_command(cargo(&["build", "--quiet", "--release", "-p", "cl-merge", "--features", "cli"]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let bench = Bench {
        ours: target.join("release/cl-merge"),
        mergekit: program("CL_MERGEKIT"),
        apr: program("CL_APR"),
        folder,
        runs: if quick { 1 } else { 3 },
    };
    let small = match std::env::var_os("CL_BENCH_MODELS") {
        Some(models) => PathBuf::from(models),
        None => make_models(&bench.folder, "135m", 7)?,
    };
    let mut text = String::new();
    writeln!(text, "{START}\n\n{}\n", machine(&bench)?)?;
    bench.methods(&small, &mut text)?;
    let large = if quick { None } else { Some(make_models(&bench.folder, "1b", 2)?) };
    bench.growth(&small, large.as_deref(), &mut text)?;
    text += END;
    let path = root().join("docs/benchmarks.md");
    let old = fs::read_to_string(&path)?;
    let new = match (old.find(START), old.find(END)) {
        (Some(a), Some(b)) if a < b => format!("{}{text}{}", &old[..a], &old[b + END.len()..]),
        _ => format!("{}\n{text}\n", old.trim_end()),
    };
    fs::write(&path, new).with_context(|| path.display().to_string())?;
    println!("{text}");
    Ok(())
}

/// Creates random models of a size, unless they exist.
fn make_models(folder: &Path, size: &str, count: usize) -> Result<PathBuf> {
    let dir = folder.join(size);
    let (dir_text, count) = (dir.display().to_string(), count.to_string());
    let build = ["run", "--quiet", "--release", "-p", "cl-merge", "--example", "make_models", "--"];
    run_command(cargo(&[&build[..], &[&dir_text, size, &count]].concat()))?;
    Ok(dir)
}

fn machine(bench: &Bench) -> Result<String> {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map_or("unknown", |l| l.trim_start_matches([':', '\t', ' ']));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let version = |program: &Path, arguments: &[&str]| -> String {
        let output = Command::new(program).args(arguments).output();
        output.map_or_else(|_| "?".to_owned(), |o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
    };
    let mut peers = vec![version(&bench.ours, &["--version"])];
    if let Some(mergekit) = &bench.mergekit {
        let python = mergekit.with_file_name("python");
        let code = "import importlib.metadata as m; print('mergekit', m.version('mergekit'), 'with torch', m.version('torch'))";
        peers.push(version(&python, &["-c", code]));
    }
    if let Some(apr) = &bench.apr {
        peers.push(version(apr, &["--version"]).lines().next().unwrap_or_default().to_owned());
    }
    let rust = version(Path::new("rustc"), &["--version"]);
    Ok(format!(
        "Machine: {cores} cores of {model}; {rust}; {}.\nWall time of whole commands and peak resident memory; inputs in the page \
         cache. Medians: of {} run(s) of mergekit and of five of cl-merge in the first table; in the last table, of \
         one run of mergekit and of three of cl-merge (one above 20 GB of input). apr was run once.\nBoth read the \
         same YAML with `dtype: bfloat16`. Our outputs are hashed and synced to disk, the others' are not.",
        peers.join("; "),
        bench.runs
    ))
}

/// Returns a merge file that both tools can read.
fn yaml(method: &str, base: Option<&Path>, models: &[PathBuf], parameters: &str) -> String {
    let mut text = format!("merge_method: {method}\n");
    if let Some(base) = base {
        let _ = writeln!(text, "base_model: {}", base.display());
    }
    text += "models:\n";
    for model in models {
        let _ = write!(text, "  - model: {}\n    parameters: {{weight: 1.0{parameters}}}\n", model.display());
    }
    text + "dtype: bfloat16\n"
}

impl Bench {
    /// Runs a command several times and returns the medians; its output is removed before every run.
    fn measure(&self, runs: usize, out: &Path, command: impl Fn() -> Command) -> Result<Measured> {
        let mut all = Vec::new();
        for _ in 0..runs {
            remove(out)?;
            // Flush data written by earlier runs, so that this run does not have to wait for it.
            let _ = Command::new("sync").status();
            all.push(once(command())?);
        }
        let median = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        remove(out)?;
        Ok(Measured {
            seconds: median(all.iter().map(|m| m.seconds).collect()),
            megabytes: median(all.iter().map(|m| m.megabytes).collect()),
        })
    }

    fn merge_ours(&self, config: &str, runs: usize) -> Result<Measured> {
        let (file, out) = (self.folder.join("merge.yaml"), self.folder.join("out"));
        fs::create_dir_all(&self.folder)?;
        fs::write(&file, config)?;
        self.measure(runs, &out, || {
            let mut command = Command::new(&self.ours);
            command.arg("run").arg(&file).arg("--out").arg(&out);
            command
        })
    }

    fn merge_theirs(&self, config: &str, runs: usize, base: &Path) -> Result<Option<Measured>> {
        let tokenizer = base.join("tokenizer.json").exists();
        let Some(mergekit) = &self.mergekit else { return Ok(None) };
        let (file, out) = (self.folder.join("merge.yaml"), self.folder.join("out"));
        fs::write(&file, config)?;
        let measured = self.measure(runs, &out, || {
            let mut command = Command::new(mergekit);
            command.arg(&file).arg(&out).arg("--allow-crimes");
            if !tokenizer {
                command.arg("--no-copy-tokenizer");
            }
            command
        })?;
        Ok(Some(measured))
    }

    fn merge_apr(&self, strategy: &str, base: &Path, models: &[PathBuf]) -> Result<Option<Measured>> {
        let Some(apr) = &self.apr else { return Ok(None) };
        let out = self.folder.join("out.safetensors");
        let weights = |model: &Path| model.join("model.safetensors");
        let measured = self.measure(1, &out, || {
            let mut command = Command::new(apr);
            command.arg("merge").args(models.iter().map(|m| weights(m)));
            command.args(["--strategy", strategy, "--density", "0.2", "--drop-rate", "0.8", "--force", "-o"]).arg(&out);
            if strategy != "average" {
                command.arg("--base-model").arg(weights(base));
            }
            command
        })?;
        Ok(Some(measured))
    }

    /// Measures merges of seven models of 135M, for the table of methods.
    fn methods(&self, small: &Path, text: &mut String) -> Result<()> {
        let base = small.join("base");
        let models: Vec<PathBuf> = (0..7).map(|i| small.join(format!("ft{i}"))).collect();
        let floor = self.floor(&base, &models)?;
        writeln!(text, "### Seven bf16 models of 135M\n")?;
        writeln!(
            text,
            "Reading all seven with `cat` and writing one with `dd` takes {:.2} s + {:.2} s.\n",
            floor.0, floor.1
        )?;
        writeln!(text, "| method | mergekit | apr | cl-merge | faster than mergekit | multiple of the floor |")?;
        writeln!(text, "| --- | --- | --- | --- | --- | --- |")?;
        for (method, parameters, apr) in [
            ("linear", "", Some("average")),
            ("ties", ", density: 0.2", Some("ties")),
            ("dare_ties", ", density: 0.2", Some("dare")),
        ] {
            let config = yaml(method, (method != "linear").then_some(base.as_path()), &models, parameters);
            warm(&base, &models)?;
            let theirs = self.merge_theirs(&config, self.runs, &base)?;
            let apr = apr.map_or(Ok(None), |strategy| self.merge_apr(strategy, &base, &models))?;
            warm(&base, &models)?;
            let ours = self.merge_ours(&config, 5)?;
            writeln!(
                text,
                "| `{method}` | {} | {} | {} | {} | {:.1} × |",
                cell(theirs),
                cell(apr),
                cell(Some(ours)),
                theirs.map_or("".to_owned(), |t| format!("{:.0} ×", t.seconds / ours.seconds)),
                ours.seconds / (floor.0 + floor.1)
            )?;
        }
        // The same merge by the paper's definition, which needs one pass less.
        let toml = toml("dare_ties", "density = 0.2\n", &base, &models);
        let file = self.folder.join("merge.toml");
        fs::write(&file, toml)?;
        let out = self.folder.join("out");
        let ours = self.measure(self.runs.max(3), &out, || {
            let mut command = Command::new(&self.ours);
            command.arg("run").arg(&file).arg("--out").arg(&out);
            command
        })?;
        writeln!(text, "| `dare_ties`, rescaled by 1 / density | | | {} | | |", cell(Some(ours)))?;
        writeln!(
            text,
            "\nThe other methods, measured only with cl-merge, with seven models if the method accepts as many:\n"
        )?;
        writeln!(text, "| method | time, memory |\n| --- | --- |")?;
        for (method, parameters, count) in [
            ("ties", "density = 0.2\n", 7),
            ("task_arithmetic", "", 7),
            ("dare_linear", "density = 0.2\n", 7),
            ("della", "density = 0.4\nepsilon = 0.1\n", 7),
            ("breadcrumbs", "density = 0.6\ngamma = 0.05\n", 7),
            ("sce", "select_topk = 0.2\n", 7),
            ("slerp", "t = 0.5\n", 1),
            ("nuslerp", "", 2),
            ("multislerp", "", 7),
            ("model_stock", "", 7),
            ("arcee_fusion", "", 1),
            ("consensus", "", 7),
            ("magmax", "", 7),
            ("iso_c", "", 7),
            ("tsv", "", 7),
            ("knots", "density = 0.2\n", 7),
            ("opcm", "", 7),
        ] {
            // Decompositions take minutes, so they are run once.
            let slow = matches!(method, "iso_c" | "tsv" | "knots" | "opcm");
            if slow && self.runs == 1 {
                continue;
            }
            fs::write(&file, self::toml(method, parameters, &base, &models[..count]))?;
            warm(&base, &models)?;
            let ours = self.measure(if slow { 1 } else { self.runs }, &out, || {
                let mut command = Command::new(&self.ours);
                command.arg("run").arg(&file).arg("--out").arg(&out);
                command
            })?;
            writeln!(text, "| `{method}` of {count} | {} |", cell(Some(ours)))?;
        }
        writeln!(text)?;
        Ok(())
    }

    /// Measures how time and memory grow with the number and the size of models.
    fn growth(&self, small: &Path, large: Option<&Path>, text: &mut String) -> Result<()> {
        writeln!(text, "### How time and memory grow\n")?;
        writeln!(text, "For more models than are available, the same files are used again under other names.\n")?;
        writeln!(text, "| model | merged | read | `linear`: mergekit | cl-merge | `ties`: mergekit | cl-merge |")?;
        writeln!(text, "| --- | --- | --- | --- | --- | --- | --- |")?;
        for (name, dir, have) in [("135M", Some(small), 7), ("1B", large, 2)] {
            let Some(dir) = dir else { continue };
            let base = dir.join("base");
            for count in [2, 7, 28] {
                let models = links(&self.folder.join(format!("links-{name}")), dir, have, count)?;
                let bytes = fs::metadata(base.join("model.safetensors"))?.len() as f64 * count as f64;
                let mut row = format!("| {name} | {count} | {:.1} GB |", bytes / 1e9);
                for method in ["linear", "ties"] {
                    let with_base = (method == "ties").then_some(base.as_path());
                    let parameters = if method == "ties" { ", density: 0.2" } else { "" };
                    let config = yaml(method, with_base, &models, parameters);
                    warm(&base, &models)?;
                    // mergekit takes minutes for larger ones.
                    let affordable = if method == "linear" { bytes < 8e9 } else { bytes < 3e9 };
                    let theirs = if affordable && self.runs > 1 { self.merge_theirs(&config, 1, &base)? } else { None };
                    warm(&base, &models)?;
                    let ours = self.merge_ours(&config, if bytes < 20e9 { 3 } else { 1 })?;
                    let _ = write!(row, " {} | {} |", cell(theirs), cell(Some(ours)));
                }
                writeln!(text, "{row}")?;
            }
        }
        writeln!(text)?;
        Ok(())
    }

    /// Measures the seconds to read the models and to write one; best of three.
    fn floor(&self, base: &Path, models: &[PathBuf]) -> Result<(f64, f64)> {
        warm(base, models)?;
        let out = self.folder.join("floor");
        fs::create_dir_all(&self.folder)?;
        let megabytes = fs::metadata(base.join("model.safetensors"))?.len() >> 20;
        let (mut read, mut write) = (f64::MAX, f64::MAX);
        for _ in 0..3 {
            let mut command = Command::new("cat");
            command.args(models.iter().map(|m| m.join("model.safetensors")));
            read = read.min(once(command)?.seconds);
            let mut command = Command::new("dd");
            command
                .arg("if=/dev/zero")
                .arg(format!("of={}", out.display()))
                .args(["bs=1M", &format!("count={megabytes}")]);
            write = write.min(once(command)?.seconds);
            remove(&out)?;
        }
        Ok((read, write))
    }
}

fn toml(method: &str, parameters: &str, base: &Path, models: &[PathBuf]) -> String {
    let list: String = models.iter().map(|m| format!("[[models]]\nmodel = {:?}\n", m.display().to_string())).collect();
    format!("base_model = {:?}\n[method.{method}]\n{parameters}\n{list}", base.display().to_string())
}

/// Returns this many directories that link to the existing models.
fn links(folder: &Path, dir: &Path, have: usize, count: usize) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder)?;
    (0..count)
        .map(|i| {
            let link = folder.join(format!("m{i}"));
            let _ = fs::remove_file(&link);
            symlink(fs::canonicalize(dir.join(format!("ft{}", i % have)))?, &link)?;
            Ok(link)
        })
        .collect()
}

/// Reads the models into the page cache.
fn warm(base: &Path, models: &[PathBuf]) -> Result<()> {
    for dir in models.iter().map(PathBuf::as_path).chain([base]) {
        let mut command = Command::new("cat");
        command.arg(dir.join("model.safetensors"));
        once(command)?;
    }
    Ok(())
}

/// Runs a command to completion, and returns its wall time and the maximum resident memory that was observed.
fn once(mut command: Command) -> Result<Measured> {
    let started = Instant::now();
    // Redirected to a file, because a full pipe that nobody reads would block the program.
    let log = std::env::temp_dir().join(format!("cl-bench-{}.log", std::process::id()));
    let stderr = fs::File::create(&log).with_context(|| log.display().to_string())?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let mut child = command.spawn().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let status = format!("/proc/{}/status", child.id());
    let mut most = 0.0f64;
    // The kernel records the maximum itself; if it is read often enough, the last value is the peak.
    let exit = loop {
        if let Some(exit) = child.try_wait()? {
            break exit;
        }
        let text = fs::read_to_string(&status).unwrap_or_default();
        let mark = text
            .lines()
            .find_map(|l| l.strip_prefix("VmHWM:"))
            .and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok());
        most = most.max(mark.unwrap_or(0.0) / 1024.0);
        std::thread::sleep(Duration::from_millis(2));
    };
    let seconds = started.elapsed().as_secs_f64();
    let error = fs::read_to_string(&log).unwrap_or_default();
    let _ = fs::remove_file(&log);
    ensure!(exit.success(), "{}: {exit}: {error}", command.get_program().display());
    Ok(Measured { seconds, megabytes: most })
}

fn remove(path: &Path) -> Result<()> {
    if path.is_dir() {
        fs::remove_dir_all(path)?;
    } else if path.exists() {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn cell(measured: Option<Measured>) -> String {
    measured.map_or_else(String::new, |m| format!("{:.2} s, {:.0} MiB", m.seconds, m.megabytes))
}

use cl_checkpoint::Manifest;

use crate::world::World;

#[test]
fn a_report_of_sequences() {
    let world = World::new();
    world.ok(["sequence", "lora.toml", "--out", "a"]);
    world.ok(["sequence", "lora.toml", "--set", "seed=8", "--out", "b"]);
    let said = world.ok(["report", "LoRA=a", "LoRA=b", "--out", "report"]);
    assert!(said.ends_with("report report/index.html\n"), "{said}");
    assert!(Manifest::verify(&world.path("report")).unwrap().is_empty());
    let matrix = |run: &str| world.json(&format!("{run}/matrix.json"))["scores"][2][0].as_f64().unwrap();
    let mean = (matrix("a") + matrix("b")) / 2.0;
    let csv = world.read("report/tables.csv");
    let line = csv.lines().find(|l| l.contains(",\"LoRA 1,2\",first,")).unwrap_or_else(|| panic!("{csv}"));
    let value: f64 = line.split("first,").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    assert!((value - mean).abs() < 1e-12, "{line}");
    assert!(world.read("report/index.html").contains("LoRA 1,2"));

    // Write it again, then once more from the report's own results.
    world.ok(["report", "LoRA=a", "LoRA=b", "--out", "report"]);
    world.ok(["report", "report", "--out", "again"]);
    assert_eq!(world.read("again/tables.csv"), csv);
}

#[test]
fn only_a_report_is_replaced() {
    let world = World::new();
    world.ok(["sequence", "lora.toml", "--out", "a"]);
    let said = world.fails(["report", "a", "--out", "a"]);
    assert!(said.contains("a exists and is not a report written by this program; choose another directory"), "{said}");
    assert!(world.exists("a/matrix.json"));
    let said = world.fails(["report", "nothing", "--out", "report"]);
    assert!(said.contains("nothing"), "{said}");
    assert!(!world.exists("report"));
}

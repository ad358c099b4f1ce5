//! Custom data: conversations and tables are shown and trained on, and errors say what to write.

use serde_json::json;

use crate::world::World;

const TEMPLATE: &str = "{% for m in messages %}{{ m.content | trim }} {% if m.role == 'assistant' %}{{ eos_token }}\n\
                        {% endif %}{% endfor %}";

#[test]
fn a_chat_is_shown_with_what_is_learned_and_trained_on() {
    let world = World::new();
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let chat = json!({"messages": [turn("user", "<s>"), turn("assistant", "</s>"), turn("user", "<unk>"), turn("assistant", "a")]});
    world.write("chat.jsonl", &format!("{chat}\n").repeat(4));
    // The model does not have a template yet.
    let message = world.fails(["data", "show", "chat.jsonl", "--model", "model"]);
    assert!(message.contains("row 0") && message.contains("chat template"), "{message}");
    world.write(
        "chat.toml",
        "model = 'model'\n[data]\ntrain = 'chat.jsonl'\n[train]\nreport_to = ['csv', 'tensorboard']\n[train.lora]\nr = 2\n",
    );
    // The problem is reported once, and nothing is written that would prevent the next attempt.
    let checked = world.run(["check", "chat.toml"]);
    assert_eq!(checked.stdout.matches("problem: chat.jsonl").count(), 1, "{}", checked.stdout);
    let message = world.fails(["train", "chat.toml", "--out", "run"]);
    assert!(message.contains("chat template") && !world.exists("run"), "{message}");
    world.write("model/chat_template.jinja", TEMPLATE);
    let shown = world.ok(["data", "show", "chat.jsonl", "--model", "model", "--rows", "1"]);
    assert!(shown.starts_with("row 0 of 4: "), "{shown}");
    assert_eq!(shown.matches('⟦').count(), 2, "{shown}");
    world.ok(["train", "chat.toml", "--out", "run"]);
    assert!(world.read("run/log.csv").starts_with("step,epoch,loss"));
    assert!(world.exists("run/events.out.tfevents.cl") && world.exists("run/adapter/adapter_model.safetensors"));
}

#[test]
fn a_table_is_trained_on_by_its_columns() {
    let world = World::new();
    world.write("stars.csv", "review,stars\n\"good, very\",5\nbad,1\n");
    let columns = ["--columns", "prompt=Review: {{ review }}", "--columns", "answer=stars"];
    let shown = world.ok(["data", "show", "stars.csv", "--model", "model"].into_iter().chain(columns));
    assert!(shown.starts_with("row 0 of 2: ") && shown.contains("⟦"), "{shown}");
    let config = "model = 'model'\n[data]\ntrain = 'stars.csv'\n\
                  columns = { prompt = \"Review: {{ review }}\", answer = 'stars' }\n[train.lora]\nr = 2\n";
    world.write("stars.toml", config);
    let checked = world.ok(["check", "stars.toml"]);
    assert!(checked.contains("rows per epoch: 2 of stars"), "{checked}");
    for (wrong, part) in [
        (
            config.replace("answer = 'stars'", "answer = 'star'"),
            "`star` is missing; the row has the keys [review, stars]",
        ),
        (config.replace("{{ review }}", "{{ revue }}"), "`revue` is missing; the row has the keys [review, stars]"),
        (config.replace("columns = {", "columns = { answr = 'x', "), "unknown key `answr` (did you mean `answer`?)"),
        (config.replace("columns", "# columns"), "unknown format with keys [review, stars]"),
    ] {
        world.write("stars.toml", &wrong);
        let message = world.fails(["train", "stars.toml", "--out", "run"]);
        assert!(message.contains(part), "{message}");
    }
    let message =
        world.fails(["data", "show", "stars.csv", "--model", "model", "--from", "2"].into_iter().chain(columns));
    assert!(message.contains("has 2 rows, counted from 0"), "{message}");
    let message = world.fails(["data", "show", "stars.csv", "--model", "model", "--columns", "prompts=a"]);
    assert!(message.contains("expected prompt, answer or messages"), "{message}");
}

#[test]
fn messages_come_as_json_and_as_much_of_them_as_is_asked_for() {
    let world = World::new();
    let run = |log: &[&str], out: &str| {
        let args = ["sequence", "lora.toml", "--out", out].into_iter().chain(log.iter().copied());
        let run = crate::world::CommandOutput::of(&mut world.command(args));
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        run.stderr
    };
    assert_eq!(run(&["-q"], "quiet"), "");
    let json = run(&["--log-format", "json"], "json");
    let lines: Vec<serde_json::Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let training = lines.iter().find(|line| line["message"] == "training").unwrap();
    assert_eq!((&training["level"], &training["span"]["name"]), (&"INFO".into(), &"training".into()));
    assert_eq!(training["spans"][0]["number"], 1, "{training}");
    let verbose = run(&["-v"], "verbose");
    assert!(verbose.contains("round{number=1 name=\"first\"}: training: step step=1"), "{verbose}");
}

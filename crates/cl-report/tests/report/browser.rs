//! The page in headless Chromium, if it is installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cl_report::write;

use crate::invented::study;

/// Finds Chromium: the program given by `CHROMIUM`, or the first of the usual names on the search path.
fn chromium() -> Option<PathBuf> {
    let named = std::env::var_os("CHROMIUM").map(PathBuf::from);
    let path = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
    named.or_else(|| {
        let places = names.iter().flat_map(|name| std::env::split_paths(&path).map(move |dir| dir.join(name)));
        places.into_iter().find(|file| file.is_file())
    })
}

fn run(browser: &Path, profile: &Path, more: &[&str], page: &Path) -> String {
    let output = Command::new(browser)
        .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=4000"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .args(more)
        .arg(format!("file://{}", page.display()))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Returns the width of a PNG, from its header.
fn width(png: &[u8]) -> u32 {
    u32::from_be_bytes(png[16..20].try_into().unwrap())
}

/// At the widths of a phone and a desktop, nothing except tables is wider than the window; clicking a header sorts by
/// its column and sets `aria-sort`; pointing at a shape shows its value as a tooltip.
#[test]
fn rendered_at_phone_and_desktop_width() {
    let Some(browser) = chromium() else {
        eprintln!("left out: no Chromium found; CHROMIUM can name one");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("report");
    write(&study(), &out).unwrap();
    let page = fs::read_to_string(out.join("index.html")).unwrap();
    let probe = folder.path().join("probe.html");
    fs::write(&probe, page.replace("</body>", &format!("<script>{PROBE}</script></body>"))).unwrap();
    for (wide, columns) in [(390, "narrow"), (1280, "wide")] {
        // Chromium's window is never narrower than 500 pixels, so the page is shown in a frame of the required width.
        let frame = folder.path().join(format!("frame-{wide}.html"));
        let html = format!(
            "<body style='margin:0'><iframe src='probe.html' style='border:0;width:{wide}px;height:900px'></iframe>"
        );
        fs::write(
            &frame,
            format!("{html}<pre id=said></pre><script>onmessage = e => said.textContent = e.data</script>"),
        )
        .unwrap();
        let profile = folder.path().join("profile");
        let dom = run(
            &browser,
            &profile,
            &["--window-size=1400,1000", "--allow-file-access-from-files", "--dump-dom"],
            &frame,
        );
        let said = dom.split("<pre id=\"said\">").nth(1).and_then(|s| s.split("</pre>").next()).unwrap_or_default();
        assert_eq!(
            said,
            format!("width {wide} of {wide}; {columns}; descending sorted; tip true; alerts 0"),
            "at {wide} pixels"
        );
    }
    let picture = folder.path().join("page.png");
    let shot = format!("--screenshot={}", picture.display());
    run(&browser, &folder.path().join("profile"), &["--window-size=1280,900", &shot], &out.join("index.html"));
    assert_eq!(width(&fs::read(picture).unwrap()), 1280);
}

const PROBE: &str = r##"
addEventListener("load", () => {
  let alerts = 0;
  window.alert = () => alerts++;
  const shown = (name) => getComputedStyle(document.querySelector("svg." + name)).display !== "none";
  const table = document.querySelector("#overview table"), head = table.tHead.rows[0].cells[2];
  head.querySelector("button").click();
  const values = [...table.tBodies[0].rows].map((row) => Number(row.cells[2].dataset.v)).filter((v) => !isNaN(v));
  const sorted = values.length > 3 && values.every((v, i) => i === 0 || values[i - 1] >= v);
  const shape = document.querySelector(shown("wide") ? "svg.wide [data-tip]" : "svg.narrow [data-tip]");
  shape.dispatchEvent(new MouseEvent("click", { bubbles: true, clientX: 5, clientY: 5 }));
  const tip = document.getElementById("tip");
  parent.postMessage([
    `width ${document.documentElement.scrollWidth} of ${innerWidth}`,
    shown("wide") ? "wide" : "narrow",
    head.getAttribute("aria-sort") + (sorted ? " sorted" : " not sorted"),
    `tip ${!tip.hidden && tip.textContent === shape.dataset.tip}`,
    `alerts ${alerts}`,
  ].join("; "), "*");
});
"##;

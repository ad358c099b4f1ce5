//! Figures as PNG. The font is embedded, so no system font is needed.

use std::sync::Arc;

use resvg::{tiny_skia, usvg};

/// Pixels per unit of the drawing.
const SCALE: f32 = 2.0;

/// Rasterizes figures with the embedded font.
pub(crate) struct Rasterizer {
    options: usvg::Options<'static>,
}

impl Rasterizer {
    pub fn new() -> Rasterizer {
        let mut fonts = usvg::fontdb::Database::new();
        for font in [dejavu::sans_condensed::regular(), dejavu::sans_condensed::bold()] {
            fonts.load_font_source(usvg::fontdb::Source::Binary(Arc::new(font)));
        }
        // The font database files condensed faces under the plain name of their family.
        let family = fonts.faces().next().map_or(String::new(), |face| face.families[0].0.clone());
        fonts.set_sans_serif_family(family);
        Rasterizer { options: usvg::Options { fontdb: Arc::new(fonts), ..usvg::Options::default() } }
    }

    /// Renders a drawing as PNG; the error is a message.
    pub fn png(&self, svg: &str) -> Result<Vec<u8>, String> {
        let tree = usvg::Tree::from_str(svg, &self.options).map_err(|e| e.to_string())?;
        let size = tree.size().to_int_size().scale_by(SCALE).ok_or("has no size")?;
        let mut pixels = tiny_skia::Pixmap::new(size.width(), size.height()).ok_or("is too large")?;
        resvg::render(&tree, tiny_skia::Transform::from_scale(SCALE, SCALE), &mut pixels.as_mut());
        pixels.encode_png().map_err(|e| e.to_string())
    }
}

// The map over the scan in three planes (NiiVue), with sliders. What it shows lies in the page as #data.
"use strict";
(async () => {
  const element = (id) => document.getElementById(id);
  const data = JSON.parse(element("data").textContent);
  const threshold = element("threshold");
  const opacity = element("opacity");
  const under = element("under");
  const top = data.volumes.length - 1; // the map

  const viewer = new niivue.Niivue({
    backColor: [0, 0, 0, 1],
    crosshairColor: [0.35, 0.65, 1, 0.6],
    crosshairGap: 8,
    crosshairWidth: 0.4,
    crosshairWidthUnit: "mm",
    dragAndDropEnabled: false,
    fontColor: [0.75, 0.78, 0.82, 1],
    fontSizeScaling: 0,
    isRadiologicalConvention: true,
    logLevel: "error",
    multiplanarLayout: 3, // a row
    multiplanarPadPixels: 12,
    multiplanarShowRender: 0, // never
    showAllOrientationMarkers: true,
    scrollRequiresFocus: true, // the wheel scrolls the page until the viewer was clicked
    sliceType: 3, // axial, coronal, sagittal
  });
  try {
    await viewer.attachToCanvas(element("canvas"));
    for (const volume of data.volumes) {
      const isMap = volume.name === "map";
      const image = await niivue.NVImage.loadFromBase64({
        base64: volume.base64,
        name: volume.name + ".nii.gz",
        colormap: isMap ? "redyell" : "gray",
        opacity: isMap || volume.name === data.volumes[0].name ? 1 : 0,
        cal_min: volume.window[0],
        cal_max: volume.window[1],
        colorbarVisible: false,
      });
      viewer.addVolume(image);
    }
  } catch (error) {
    element("failed").textContent = "The viewer needs WebGL 2, which this browser does not offer. The slices below show the same.";
    element("failed").hidden = false;
    document.body.dataset.viewer = "failed";
    return;
  }

  // millilitres above a threshold, from a histogram that is counted once
  const map = viewer.volumes[top];
  const counts = new Uint32Array(256);
  for (const value of map.img) counts[value]++;
  const slope = map.hdr.scl_slope || 1;
  const above = (limit) => counts.reduce((sum, count, step) => sum + (step * slope > limit ? count : 0), 0);

  const show = () => {
    const limit = Number(threshold.value);
    // the colours start at the threshold and end where those of the picture do
    map.cal_min = limit;
    map.cal_max = Math.max(3 * data.threshold, limit * 1.001);
    element("threshold-value").value = limit.toPrecision(3);
    element("scale-low").value = "threshold " + map.cal_min.toPrecision(3);
    element("scale-high").value = map.cal_max.toPrecision(3) + " and more";
    element("opacity-value").value = Math.round(100 * opacity.value) + " %";
    element("volume").value = (above(limit) * data.voxel_ml).toFixed(1) + " ml";
    map.opacity = Number(opacity.value);
    if (under) viewer.volumes[1].opacity = under.value === "reconstruction" ? 1 : 0;
    viewer.updateGLVolume();
  };
  const goTo = (mm) => {
    viewer.scene.crosshairPos = viewer.mm2frac(mm);
    viewer.createOnLocationChange();
    viewer.drawScene();
  };
  viewer.onLocationChange = (location) => {
    const [x, y, z] = location.mm;
    const side = (value, letters) => letters[value < 0 ? 1 : 0] + " " + Math.abs(value).toFixed(0);
    const value = location.values[top]?.value ?? 0;
    element("place").textContent =
      `${side(x, "RL")}  ${side(y, "AP")}  ${side(z, "SI")} mm,  map ${value.toPrecision(2)}`;
  };

  threshold.addEventListener("input", show);
  opacity.addEventListener("input", show);
  under?.addEventListener("change", show);
  element("reset").addEventListener("click", () => {
    threshold.value = data.threshold;
    show();
  });
  const rows = [...document.querySelectorAll("tr.jump")];
  for (const row of rows) {
    const jump = () => {
      rows.forEach((other) => other.classList.toggle("chosen", other === row));
      goTo(JSON.parse(row.dataset.mm));
    };
    row.addEventListener("click", jump);
    row.addEventListener("keydown", (event) => event.key === "Enter" && jump());
  }
  show();
  goTo(data.peak_mm);
  document.body.dataset.viewer = "ready";
})();

// Shows the models that this project writes: GLB with one mesh, two textures (WebP or PNG) and no transforms.

const TEXTURE_SIDE = 4096; // larger ones are halved: with mipmaps they take 85 MB as it is
const FIELD = 0.6; // of view, radians
const TURN_SECONDS = 16;
const SLOW_SECONDS = 0.07; // between two frames
const LEAST_DENSITY = 0.5; // drawn pixels per pixel of the page
const PITCH_LIMIT = 1.5; // radians; at the pole "up" would be lost
const START = { yaw: 0.6, pitch: 0.3, distance: 1 };

// glTF's name, the shader's name, components; in the order of the shader's locations.
const ATTRIBUTES = [
  ["POSITION", "a_position", 3],
  ["NORMAL", "a_normal", 3],
  ["TEXCOORD_0", "a_uv", 2],
];

const VERTEX = `#version 300 es
in vec3 a_position;
in vec3 a_normal;
in vec2 a_uv;
uniform mat4 u_view;
uniform mat4 u_projection;
out vec3 v_position;
out vec3 v_normal;
out vec2 v_uv;
void main() {
  vec4 seen = u_view * vec4(a_position, 1.0);
  v_position = seen.xyz;
  v_normal = mat3(u_view) * a_normal;
  v_uv = a_uv;
  gl_Position = u_projection * seen;
}`;

// Everything is in the camera's space: the lights stand around the camera, as if the model stood on a turntable.
const FRAGMENT = `#version 300 es
precision highp float;
in vec3 v_position;
in vec3 v_normal;
in vec2 v_uv;
uniform sampler2D u_color;     // base colour, alpha; decoded from sRGB by the texture unit
uniform sampler2D u_material;  // green: roughness, blue: metalness
uniform vec2 u_alpha;          // drawn is what has alpha of at least x and below y
uniform bool u_solid;
out vec4 color;

const float PI = 3.14159265;
const vec3 TOWARDS[3] = vec3[3](vec3(-0.50, 0.62, 0.60), vec3(0.83, 0.10, 0.55), vec3(0.25, 0.55, -0.80));
const vec3 LIGHTS[3] = vec3[3](vec3(2.9, 2.8, 2.6), vec3(0.8, 0.9, 1.1), vec3(1.6, 1.6, 1.7));

vec3 surroundings(vec3 direction, float roughness) {
  float edge = mix(0.15, 1.0, roughness);
  float sky = smoothstep(-edge, edge, direction.y - 0.1);
  float lamp = smoothstep(0.80 - 0.5 * edge, 0.90 + 0.1 * edge, dot(direction, normalize(TOWARDS[0])));
  return mix(vec3(0.38, 0.37, 0.36), vec3(0.80, 0.82, 0.86), sky) + lamp * mix(1.8, 0.15, roughness);
}

void main() {
  vec4 base = texture(u_color, v_uv);
  if (base.a < u_alpha.x || base.a >= u_alpha.y) discard;
  float alpha = u_solid ? 1.0 : base.a;
  vec4 material = texture(u_material, v_uv);
  float roughness = clamp(material.g, 0.05, 1.0);
  float metalness = material.b;

  vec3 n = normalize(v_normal) * (gl_FrontFacing ? 1.0 : -1.0);
  vec3 v = normalize(-v_position);
  float nv = max(dot(n, v), 1e-3);
  vec3 f0 = mix(vec3(0.04), base.rgb, metalness);
  vec3 diffuse = base.rgb * (1.0 - metalness);

  float a = roughness * roughness;
  float k = 0.5 * a;
  vec3 sum = vec3(0.0);
  for (int i = 0; i < 3; i++) {
    vec3 l = normalize(TOWARDS[i]);
    vec3 h = normalize(l + v);
    float nl = max(dot(n, l), 0.0);
    float nh = max(dot(n, h), 0.0);
    float spread = nh * nh * (a * a - 1.0) + 1.0;
    float lobe = a * a / (PI * spread * spread);
    float shadowing = 1.0 / (4.0 * (nl * (1.0 - k) + k) * (nv * (1.0 - k) + k));
    vec3 fresnel = f0 + (1.0 - f0) * pow(1.0 - max(dot(h, v), 0.0), 5.0);
    sum += (diffuse / PI * (1.0 - fresnel) + fresnel * lobe * shadowing) * LIGHTS[i] * nl;
  }
  vec3 grazing = f0 + (max(vec3(1.0 - roughness), f0) - f0) * pow(1.0 - nv, 5.0);
  sum += diffuse * surroundings(n, 1.0) * (1.0 - grazing);
  sum += grazing * surroundings(reflect(-v, n), roughness) * (1.0 - 0.4 * roughness);

  vec3 shown = sum * (1.0 + sum / 9.0) / (1.0 + sum * 0.45);
  shown = mix(12.92 * shown, 1.055 * pow(shown, vec3(1.0 / 2.4)) - 0.055, step(0.0031308, shown));
  color = vec4(clamp(shown, 0.0, 1.0) * alpha, alpha);
}`;

const DAMAGED = "The model cannot be shown in this page; download it instead.";

/** Take a GLB apart; the parts are views of its bytes. Throws an Error for what this project does not write. */
function readGlb(buffer) {
  const head = new DataView(buffer);
  if (buffer.byteLength < 20 || head.getUint32(0, true) !== 0x46546c67) throw new Error(DAMAGED);
  const length = head.getUint32(12, true);
  const document = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 20, length)));
  const binary = 20 + length + 8;
  const bytes = (view) => {
    const { byteOffset = 0, byteLength } = document.bufferViews[view];
    return new Uint8Array(buffer, binary + byteOffset, byteLength);
  };
  const [primitive] = document.meshes[0].primitives;
  const material = document.materials[primitive.material];
  const picture = ({ index }) => {
    const texture = document.textures[index];
    const image = document.images[texture.extensions?.EXT_texture_webp?.source ?? texture.source];
    return new Blob([bytes(image.bufferView)], { type: image.mimeType });
  };
  const accessor = (number) => document.accessors[number];
  const { min, max } = accessor(primitive.attributes.POSITION);
  const indices = accessor(primitive.indices);
  return {
    attributes: ATTRIBUTES.map(([name]) => bytes(accessor(primitive.attributes[name]).bufferView)),
    indices: bytes(indices.bufferView),
    count: indices.count,
    short: indices.componentType === 5123,
    center: min.map((low, axis) => (low + max[axis]) / 2),
    radius: Math.hypot(...min.map((low, axis) => max[axis] - low)) / 2 || 1,
    color: picture(material.pbrMetallicRoughness.baseColorTexture),
    material: picture(material.pbrMetallicRoughness.metallicRoughnessTexture),
    alphaMode: material.alphaMode ?? "OPAQUE",
    cutoff: material.alphaCutoff ?? 0.5,
  };
}

async function decode(blob, limit) {
  const options = { premultiplyAlpha: "none", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(blob, options);
  if (Math.max(bitmap.width, bitmap.height) <= limit) return bitmap;
  const size = { resizeWidth: limit, resizeHeight: limit, resizeQuality: "medium" };
  return createImageBitmap(bitmap, { ...options, ...size });
}

/** A model in a canvas that pointers, wheels and keys turn. onTurning(bool): it began or stopped to turn by itself. */
export class Viewer {
  constructor(canvas, onTurning) {
    this.canvas = canvas;
    this.onTurning = onTurning;
    this.gl = canvas.getContext("webgl2");
    if (!this.gl) throw new Error("This browser has no WebGL 2, so the model is not shown; download it instead.");
    this.model = null; // as readGlb gave it, with its pictures decoded
    this.scene = null; // what the GPU holds of it
    this.turning = false;
    this.camera = { ...START };
    this.density = Math.min(devicePixelRatio, 2);
    this.pointers = new Map();
    this.wanted = 0; // number of the frame that was asked for
    this.before = 0; // time of the last frame
    canvas.addEventListener("webglcontextlost", (event) => {
      event.preventDefault();
      this.scene = null;
    });
    canvas.addEventListener("webglcontextrestored", () => {
      if (this.model) this.#upload();
    });
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointermove", (event) => this.#drag(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, (event) => this.pointers.delete(event.pointerId));
    }
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#ask()).observe(canvas);
  }

  /** Show the GLB in an ArrayBuffer. Throws an Error with a sentence where that cannot be done. */
  async show(buffer) {
    this.clear();
    let model;
    try {
      model = readGlb(buffer);
      const limit = Math.min(TEXTURE_SIDE, this.gl.getParameter(this.gl.MAX_TEXTURE_SIZE));
      model.pictures = await Promise.all([decode(model.color, limit), decode(model.material, limit)]);
    } catch {
      throw new Error(DAMAGED);
    }
    this.model = model;
    this.camera = { ...START };
    this.#upload();
    this.turn(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  }

  /** Forget the model. */
  clear() {
    const { gl, scene } = this;
    if (scene) {
      gl.deleteProgram(scene.program);
      gl.deleteVertexArray(scene.array);
      scene.buffers.forEach((buffer) => gl.deleteBuffer(buffer));
      scene.textures.forEach((texture) => gl.deleteTexture(texture));
    }
    this.model?.pictures.forEach((picture) => picture.close());
    this.model = this.scene = null;
  }

  /** Turn by itself, or stop. */
  turn(on) {
    this.turning = on;
    this.before = 0;
    this.onTurning(on);
    this.#ask();
  }

  #upload() {
    const { gl, model } = this;
    const program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
      gl.deleteShader(shader); // it goes with the program
    }
    ATTRIBUTES.forEach(([, name], location) => gl.bindAttribLocation(program, location, name));
    gl.linkProgram(program);

    const array = gl.createVertexArray();
    gl.bindVertexArray(array);
    const fill = (target, data) => {
      const buffer = gl.createBuffer();
      gl.bindBuffer(target, buffer);
      gl.bufferData(target, data, gl.STATIC_DRAW);
      return buffer;
    };
    const buffers = model.attributes.map((data, location) => {
      const buffer = fill(gl.ARRAY_BUFFER, data);
      gl.enableVertexAttribArray(location);
      gl.vertexAttribPointer(location, ATTRIBUTES[location][2], gl.FLOAT, false, 0, 0);
      return buffer;
    });
    buffers.push(fill(gl.ELEMENT_ARRAY_BUFFER, model.indices));
    const textures = [this.#texture(model.pictures[0], gl.SRGB8_ALPHA8), this.#texture(model.pictures[1], gl.RGBA8)];
    const place = Object.fromEntries(
      ["u_view", "u_projection", "u_color", "u_material", "u_alpha", "u_solid"].map((name) => [
        name,
        gl.getUniformLocation(program, name),
      ]),
    );
    this.scene = { program, array, buffers, textures, place };
    this.#ask();
  }

  #texture(picture, format) {
    const { gl } = this;
    const texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
    gl.texImage2D(gl.TEXTURE_2D, 0, format, gl.RGBA, gl.UNSIGNED_BYTE, picture);
    gl.generateMipmap(gl.TEXTURE_2D);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR_MIPMAP_LINEAR);
    return texture;
  }

  #ask() {
    this.wanted ||= requestAnimationFrame((now) => {
      this.wanted = 0;
      if (this.turning && this.before) {
        const seconds = (now - this.before) / 1000;
        this.camera.yaw += (seconds * 2 * Math.PI) / TURN_SECONDS;
        // A machine that cannot keep up gets fewer pixels, so that the rest of the page stays usable.
        if (seconds > SLOW_SECONDS) this.density = Math.max(LEAST_DENSITY, this.density * 0.8);
      }
      this.before = now;
      this.#draw();
      if (this.turning && this.scene) this.#ask();
    });
  }

  #draw() {
    const { gl, canvas, scene, model } = this;
    const width = Math.round(canvas.clientWidth * this.density);
    const height = Math.round(canvas.clientHeight * this.density);
    if (!scene || !width || !height) return;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    gl.viewport(0, 0, width, height);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.DEPTH_TEST);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.useProgram(scene.program);
    gl.bindVertexArray(scene.array);
    scene.textures.forEach((texture, unit) => {
      gl.activeTexture(gl.TEXTURE0 + unit);
      gl.bindTexture(gl.TEXTURE_2D, texture);
    });
    gl.uniform1i(scene.place.u_color, 0);
    gl.uniform1i(scene.place.u_material, 1);
    this.#look(width / height);

    const pass = (low, high) => {
      gl.uniform2f(scene.place.u_alpha, low, high);
      gl.drawElements(gl.TRIANGLES, model.count, model.short ? gl.UNSIGNED_SHORT : gl.UNSIGNED_INT, 0);
    };
    const solid = model.alphaMode !== "BLEND";
    gl.uniform1i(scene.place.u_solid, Number(solid));
    if (solid) return pass(model.alphaMode === "MASK" ? model.cutoff : 0, 2);
    pass(0.98, 2);
    // What is seen through comes after what is not, and hides nothing; its own order is left to chance.
    gl.enable(gl.BLEND);
    gl.depthMask(false);
    pass(0.004, 0.98);
    gl.depthMask(true);
    gl.disable(gl.BLEND);
  }

  /** Set the camera: it looks at the middle of the model from a distance at which all of it is seen. */
  #look(aspect) {
    const { gl, model, camera, scene } = this;
    const half = Math.tan(FIELD / 2);
    const distance = (camera.distance * model.radius) / Math.sin(Math.atan(half * Math.min(aspect, 1)));
    const [sy, cy] = [Math.sin(camera.yaw), Math.cos(camera.yaw)];
    const [sp, cp] = [Math.sin(camera.pitch), Math.cos(camera.pitch)];
    const right = [cy, 0, -sy];
    const up = [-sy * sp, cp, -cy * sp];
    const back = [sy * cp, sp, cy * cp];
    const rows = [right, up, back];
    const shift = rows.map((row) => -row.reduce((sum, value, axis) => sum + value * model.center[axis], 0));
    shift[2] -= distance;
    const view = [0, 1, 2].flatMap((axis) => [right[axis], up[axis], back[axis], 0]).concat(shift, 1);
    const [near, far] = [Math.max(distance - model.radius, distance * 0.01), distance + model.radius];
    const projection = new Float32Array(16);
    projection[0] = 1 / (half * aspect);
    projection[5] = 1 / half;
    projection[10] = (near + far) / (near - far);
    projection[11] = -1;
    projection[14] = (2 * near * far) / (near - far);
    gl.uniformMatrix4fv(scene.place.u_view, false, view);
    gl.uniformMatrix4fv(scene.place.u_projection, false, projection);
  }

  /** Move the camera by angles, and come closer by a factor. */
  #move(yaw, pitch, factor = 1) {
    const { camera } = this;
    camera.yaw += yaw;
    camera.pitch = Math.max(-PITCH_LIMIT, Math.min(PITCH_LIMIT, camera.pitch + pitch));
    camera.distance = Math.max(0.25, Math.min(4, camera.distance / factor));
    if (this.turning) this.turn(false);
    this.#ask();
  }

  #press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, event);
  }

  #drag(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const other = [...this.pointers.values()].find((pointer) => pointer.pointerId !== event.pointerId);
    this.pointers.set(event.pointerId, event);
    if (other) {
      const apart = (pointer) => Math.hypot(pointer.clientX - other.clientX, pointer.clientY - other.clientY) || 1;
      this.#move(0, 0, apart(event) / apart(before));
    } else {
      const scale = Math.PI / this.canvas.clientHeight;
      this.#move((before.clientX - event.clientX) * scale, (event.clientY - before.clientY) * scale);
    }
  }

  #wheel(event) {
    // Who scrolls past the model wants the page to scroll.
    if (document.activeElement !== this.canvas) return;
    event.preventDefault();
    this.#move(0, 0, Math.exp(-event.deltaY / 800));
  }

  #key(event) {
    const step = Math.PI / 18;
    const moves = {
      ArrowLeft: [-step, 0],
      ArrowRight: [step, 0],
      ArrowUp: [0, step],
      ArrowDown: [0, -step],
      "+": [0, 0, 1.15],
      "=": [0, 0, 1.15],
      "-": [0, 0, 1 / 1.15],
    };
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Home") this.camera = { ...START };
    else if (!(event.key in moves)) return;
    event.preventDefault();
    this.#move(...(moves[event.key] ?? [0, 0]));
  }
}

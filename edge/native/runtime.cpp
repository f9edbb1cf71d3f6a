// A C interface to the ExecuTorch runtime, for ctypes and JNI: open a program, run a method on arrays, read the outputs.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

namespace executorch::extension::threadpool {
// The wheel has this class but not its header.
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
} // namespace executorch::extension::threadpool

using executorch::extension::Module;
using executorch::runtime::EValue;

namespace {
constexpr int MAX_DIMS = 8;

struct Program {
  std::unique_ptr<Module> module;
  std::vector<EValue> outputs;
};

int fail(char* message, size_t room, const std::string& text) {
  std::snprintf(message, room, "%s", text.c_str());
  return 1;
}

std::string name_of(executorch::runtime::Error error) {
  return std::string(executorch::runtime::to_string(error));
}
} // namespace

extern "C" {

// `dtype` counts as in ExecuTorch's ScalarType: uint8 0, int64 4, float16 5, float32 6, bool 11.
struct expertfleet_array {
  void* data;
  int64_t sizes[MAX_DIMS];
  int32_t dims;
  int32_t dtype;
};

// Threads that operators share; the calling thread is one of them.
int expertfleet_set_threads(uint32_t threads) {
  auto* pool = executorch::extension::threadpool::get_threadpool();
  return pool && pool->_unsafe_reset_threadpool(threads) ? 0 : 1;
}

// The file is mapped, not read. On failure null, and why in `message`.
Program* expertfleet_open(const char* path, char* message, size_t room) {
  auto program = std::make_unique<Program>();
  program->module = std::make_unique<Module>(path, Module::LoadMode::Mmap);
  const auto error = program->module->load();
  if (error != executorch::runtime::Error::Ok) {
    fail(message, room, name_of(error));
    return nullptr;
  }
  return program.release();
}

// Bytes of the arena that `method` plans; negative when there is no such method.
int64_t expertfleet_arena(Program* program, const char* method) {
  const auto meta = program->module->method_meta(method);
  if (!meta.ok()) return -1;
  int64_t total = 0;
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const auto size = meta->memory_planned_buffer_size(i);
    total += size.ok() ? *size : 0;
  }
  return total;
}

// Runs `method`; the arrays must live until the next run. Returns 0, or 1 and why in `message`.
int expertfleet_run(Program* program, const char* method, const expertfleet_array* inputs, int32_t count, char* message,
                    size_t room) {
  std::vector<executorch::extension::TensorPtr> tensors;
  std::vector<EValue> values;
  for (int32_t i = 0; i < count; ++i) {
    const auto& input = inputs[i];
    if (input.dims < 0 || input.dims > MAX_DIMS) return fail(message, room, "too many dimensions");
    std::vector<executorch::aten::SizesType> sizes(input.sizes, input.sizes + input.dims);
    tensors.push_back(executorch::extension::from_blob(
        input.data, std::move(sizes), static_cast<executorch::aten::ScalarType>(input.dtype)));
    values.emplace_back(tensors.back());
  }
  auto result = program->module->execute(method, values);
  if (!result.ok()) return fail(message, room, name_of(result.error()));
  program->outputs = std::move(*result);
  return 0;
}

int32_t expertfleet_output_count(Program* program) { return static_cast<int32_t>(program->outputs.size()); }

// Output `index` of the last run: memory of the program, overwritten by the next run.
int expertfleet_output(Program* program, int32_t index, expertfleet_array* into) {
  if (index < 0 || index >= expertfleet_output_count(program) || !program->outputs[index].isTensor()) return 1;
  const auto& tensor = program->outputs[index].toTensor();
  if (tensor.dim() > MAX_DIMS) return 1;
  into->data = const_cast<void*>(tensor.const_data_ptr());
  into->dims = static_cast<int32_t>(tensor.dim());
  into->dtype = static_cast<int32_t>(tensor.scalar_type());
  for (int32_t i = 0; i < into->dims; ++i) into->sizes[i] = tensor.size(i);
  return 0;
}

void expertfleet_close(Program* program) { delete program; }

} // extern "C"

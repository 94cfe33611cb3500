from timm_dvt.viewer.app import serve

serve(host="0.0.0.0", port=7860)
